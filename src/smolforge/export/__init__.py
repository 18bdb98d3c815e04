"""Roads out: what smolforge makes of a checkpoint for other programs.

gguf.py    one file for llama.cpp; gguf_vocabulary.py  its tokenizer
plain.py   a model directory without training state
space.py   a Hugging Face Space that serves the page
push.py    a model on the Hub
"""
