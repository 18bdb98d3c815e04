"""Exports: one file or directory of a model for other programs.

Every smolforge checkpoint is a Hugging Face model directory already, so an export only leaves something out (the
training state), adds something (an app) or writes another format (GGUF). Each reads the checkpoint through
`checkpoint/`, and writes to a temporary path that is renamed when all is done: a failed export leaves nothing.

Read in this order:

    push.py       a model without its training state: copied to a directory, or uploaded to the Hub
    space.py      a Hugging Face Space: a Gradio app with the model and this package
    gguf.py       one GGUF file for llama.cpp, with its tokenizer
    calibrate.py  four bits for it, chosen by text
    check.py      what llama.cpp writes from that file, beside what smolforge writes
    ollama.py     the same in a directory for Ollama, with its chat template

templates/ holds the files of a Space.
"""
