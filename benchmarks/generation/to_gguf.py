"""The benchmark's model as GGUF files for llama.cpp: `python to_gguf.py WORKSPACE`, where `gguf` is installed.

Like `smolforge export --to gguf`, but for every precision, with a vocabulary of placeholders, and without
smolforge: it runs in llama.cpp's environment.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

KINDS = {"f32": "F32", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All fp32 tensors of a file."""
    raw = np.memmap(path, mode="r")
    (length,) = struct.unpack("<Q", raw[:8].tobytes())
    header = json.loads(raw[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return {
        name: data[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """From the half-rotation layout to llama.cpp's pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def main() -> None:
    """Write one file for each kind."""
    workspace = Path(sys.argv[1])
    config = json.loads((workspace / "hf" / "config.json").read_text())
    weights = read_safetensors(workspace / "hf" / "model.safetensors")
    heads, kv_heads, vocab = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for kind, type_name in KINDS.items():
        writer = gguf.GGUFWriter(workspace / f"{kind}.gguf", "llama")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(float(config["rope_theta"]))
        writer.add_rope_dimension_count(config["hidden_size"] // heads)
        writer.add_vocab_size(vocab)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([f"t{i}" for i in range(vocab)])
        writer.add_token_types([int(gguf.TokenType.NORMAL)] * vocab)
        writer.add_token_merges(["t 1"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        for name, weight in weights.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = interleave(weight, heads if "q_proj" in name else kv_heads)
            target = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else type_name]
            packed = gguf.quants.quantize(np.ascontiguousarray(weight), target)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), packed, raw_dtype=target)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    main()
