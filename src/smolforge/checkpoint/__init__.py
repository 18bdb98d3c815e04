"""Checkpoints: Hugging Face model directories that are written whole or not at all.

format.py   the directory: config, weights, tokenizer, card
weights.py  safetensors read with suspicion
state.py    what only training needs, in safetensors and JSON
commit.py   written beside, fsynced, renamed; verified, found, pruned
background.py  the same in a thread
locate.py   from a name (run, directory, Hub id) to a loaded model
card.py     the README of a checkpoint
"""
