"""The models: architectures, their initialisation, attention and loss, and their size in numbers.

A language model is a `CausalLM`: a `Decoder` that turns tokens into hidden states, and a head that turns these into
logits. An architecture is one file in this folder with one record, an `Architecture`; the rest of smolforge finds it by
the `architecture` of a configuration or the `model_type` of a config.json, and asks the record what differs. How a
model computes (which attention, which loss, recomputation, compiling) is chosen by arguments of `build_model` and
changes no name in its state dict. Training, benchmarks and evaluation all call `CausalLM.loss`. Nothing here knows of
files, data or training.

In the order to read them:

    architecture.py  Decoder, CausalLM, the record Architecture, new weights, build_model
    llama.py         SmolLM2's architecture, block by block
    qwen.py          Qwen2 and Qwen3
    smollm3.py       SmolLM3
    attention.py     exact causal attention: torch's, in blocks, in C++
    documents.py     positions and masks of packed documents
    dropout.py       dropout that follows from seed and step
    loss.py          the loss of the next token, without storing the logits as a whole
    recreation.py    the seed's own architecture
    lora.py          low-rank adapters beside a model's matrices
    hf_config.py     config.json's keys and back
    summary.py       parameters, FLOPs, memory
"""
