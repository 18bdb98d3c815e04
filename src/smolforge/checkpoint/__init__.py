"""Checkpoints: Hugging Face model directories that exist completely or not at all. In the order to read them:

format.py       the directory: config, weights, tokenizer, card
gguf.py         the same from a GGUF file: config, generation defaults, weights
weights.py      read untrusted safetensors files; write them
adapter.py      low-rank adapters in peft's form
state.py        what only training needs, in safetensors and JSON
commit.py       write, fsync, rename; verify, find, prune
parts.py        the files that each process of a sharded run writes
background.py   the same in a thread
locate.py       from a name (run, directory, Hub id) to a loaded model, or to what `smolforge verify` says of it
card.py         the README of a checkpoint
"""
