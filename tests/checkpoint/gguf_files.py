"""Small GGUF files, written with the gguf package: any type of weights, any tokenizer, any fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer as Backend

SHAPE = {
    "block_count": 1, "context_length": 64, "embedding_length": 256, "feed_forward_length": 256,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 64,
}  # fmt: skip
SIZES = {
    "token_embd": (320, 256), "output_norm": (256,), "blk.0.attn_norm": (256,), "blk.0.ffn_norm": (256,),
    "blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256), "blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256),
    "blk.0.ffn_gate": (256, 256), "blk.0.ffn_up": (256, 256), "blk.0.ffn_down": (256, 256),
}  # fmt: skip


def write_gguf(
    path: Path, kind: str = "F32", *, architecture: str = "llama", keys: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None, drop: str = "", extra: dict[str, np.ndarray] | None = None, seed: int = 0, rows: int = 320,
) -> Path:  # fmt: skip
    """A Llama of one layer whose matrices are random bytes of the type `kind`."""
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in SHAPE.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for key, value in {**(keys or {}), **(tokenizer or byte_level())}.items():
        _add(writer, key, value)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, shape in SIZES.items():
        if name == drop:
            continue
        if name == "token_embd":
            shape = (rows, shape[1])
        if len(shape) == 1 or kind == "F32":
            numbers = draw.normal(size=shape).astype(np.float32)
            if kind == "BF16":  # norms are fp32 in such files, with numbers of bfloat16
                numbers = (numbers.view(np.uint32) & 0xFFFF0000).view(np.float32)
            writer.add_tensor(f"{name}.weight", numbers)
        else:
            per, size = gguf.GGML_QUANT_SIZES[quantization]
            # Small bytes, so that the two bytes of a scale are a number of half precision and not NaN.
            blocks = draw.integers(0, 123, (shape[0], shape[1] // per * size), dtype=np.uint8)
            if kind in ("F16", "BF16"):
                blocks = gguf.quants.quantize(draw.normal(size=shape).astype(np.float32), quantization)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=quantization)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def of_backend(backend: Backend, pre: str | None, **ids: int) -> dict[str, Any]:
    """The tokenizer keys of a byte-level tokenizer of the `tokenizers` library."""
    import json

    file = json.loads(backend.to_str())
    special = {token["content"] for token in file["added_tokens"]}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in file["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0, **{f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()},
    }  # fmt: skip


def byte_level() -> dict[str, Any]:
    """The keys of a tokenizer of SmolLM2's kind."""
    from smolforge.tokenizer import Tokenizer

    return of_backend(Tokenizer.train(["the cat sat on the mat " * 20], 300).backend, "smollm", bos=1)
