"""A GGUF file as a model: what its config.json, generation_config.json and model.safetensors would hold.

Tensors have GGUF's names there, and the rows of q and k are in llama.cpp's order (neighbouring pairs are rotated where
Hugging Face rotates halves); both are undone here. The file itself and its tokenizer are read by `gguf_file`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smolforge.errors import CheckpointError
from smolforge.gguf_file import Blocks, GgufFile, end_ids

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from smolforge.config import ModelConfig

# Keys behind the architecture's name, and Hugging Face's names for them.
_KEYS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}  # fmt: skip
RUN_AS_THEY_ARE = ("Q8_0", "Q4_0", "Q4_1")  # by the native step, see kernels/layout.h
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3's scaling divides each frequency by
_PERMUTED = ("llama", "smollm3")  # llama.cpp's other architectures rotate halves, as Hugging Face does


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """The values of config.json that a file's metadata mean, to be checked; CheckpointError for one unknown here."""
    from smolforge.model.architecture import architectures

    metadata, where = file.metadata, str(file.path)
    name = metadata.get("general.architecture")
    known = {each.gguf: each for each in architectures().values() if each.gguf}
    if name not in known:
        raise CheckpointError(
            f"the architecture {name!r} is not supported", field=f"{where}: general.architecture",
            hint=f"Supported: {', '.join(known)}.",
        )  # fmt: skip
    if metadata.get("split.count", 1) != 1:
        hint = "Join them with llama-gguf-split --merge."
        raise CheckpointError(f"is one of {metadata['split.count']} parts", field=where, hint=hint)
    if _EMBEDDING not in file.tensors:
        raise CheckpointError(f"has no tensor {_EMBEDDING}: it is not a whole model", field=where)
    values = {ours: metadata.get(f"{name}.{key}") for key, ours in _KEYS.items()}
    kind, experts = metadata.get(f"{name}.rope.scaling.type", "none"), metadata.get(f"{name}.expert_count", 0)
    scaled = "Supported: none, and Llama 3's factors as a tensor."
    for what, found, right, hint in (
        ("rope.scaling.type", kind, "none", scaled), ("expert_count", experts, 0, "Supported: models without experts."),
    ):  # fmt: skip
        if found != right:
            raise CheckpointError(f"{found!r} is not supported", field=f"{where}: {name}.{what}", hint=hint)
    return {
        **values,
        "model_type": known[name].model_type,
        "vocab_size": file.tensors[_EMBEDDING].shape[0],
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "rope_scaling": _scaling(file) if ROPE_FACTORS in file.tensors else None,
        "head_dim": metadata.get(f"{name}.attention.key_length", metadata.get(f"{name}.rope.dimension_count")),
        "tie_word_embeddings": _HEAD not in file.tensors,
    }


def rope_factors(config: ModelConfig) -> Tensor:
    """What Llama 3's scaling divides the rotary frequencies by, (d / 2,)."""
    import torch

    from smolforge.model.llama import scale_frequencies

    assert config.rope_scaling is not None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies / scale_frequencies(frequencies, config.rope_scaling)


def _scaling(file: GgufFile) -> dict[str, Any]:
    """Llama 3's scaling from the factors of a file, which holds no other trace of it."""
    import numpy as np

    from smolforge.config import ModelConfig

    name, factors = file.metadata["general.architecture"], file.dequantized(ROPE_FACTORS)
    theta = float(file.metadata.get(f"{name}.rope.freq_base", 10_000.0))
    for context in (8192, 4096, 2048, 1024, 32):
        scaling = {
            "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }  # fmt: skip
        guess = ModelConfig(head_dim=2 * len(factors), rope_theta=theta, rope_scaling=scaling)  # type: ignore[arg-type]
        if np.allclose(rope_factors(guess).numpy(), factors, rtol=1e-3):
            return scaling
    raise CheckpointError(f"scales the rotation ({ROPE_FACTORS}) otherwise than Llama 3", field=str(file.path))


def gguf_generation_defaults(file: GgufFile) -> dict[str, Any]:
    """What generation_config.json would hold: the special ids."""
    keys = {"bos_token_id": "tokenizer.ggml.bos_token_id", "pad_token_id": "tokenizer.ggml.padding_token_id"}
    found: dict[str, Any] = {
        name: file.metadata[key] for name, key in keys.items() if type(file.metadata.get(key)) is int
    }
    if ends := end_ids(file.metadata):
        found["eos_token_id"] = ends
    return found


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """GGUF's name of every tensor of a model, by ours."""
    import gguf

    from smolforge.model.architecture import architecture_of, build_model

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture_of(config).gguf or ""], config.num_hidden_layers)
    found = {}
    for ours in build_model(config, device="meta", seed=None).state_dict():
        stem, _, end = ours.rpartition(".")
        name = names.get_name(stem)
        assert name is not None, ours
        found[ours] = f"{name}.{end}"
    return found


def read_gguf_weights(file: GgufFile) -> dict[str, Tensor]:
    """All tensors under Hugging Face's names: bfloat16 where that keeps all numbers of the file, else fp32.

    Those that the native step can run as they are have them as an attribute, see `gguf_file.Blocks`.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a type that cannot be decoded.
    """
    import numpy as np
    import torch

    from smolforge.model.architecture import config_from_hf

    config = config_from_hf(gguf_config(file))
    names = {theirs: ours for ours, theirs in gguf_names(config).items()}
    weights = {}
    for name in file.tensors:
        if name == ROPE_FACTORS:
            continue
        if name not in names:
            raise CheckpointError(f"has the tensor {name!r}, which this kind of model has not", field=str(file.path))
        array, ours, rows = file.dequantized(name), names[name], file.blocks(name)
        if (heads := permuted_heads(config, ours)) and array.shape[0] == heads * config.head_dim:
            array, rows = unpermute(array, heads), unpermute(rows, heads)
        weights[ours] = torch.from_numpy(array)
        if (kind := file.type_name(name)) in RUN_AS_THEY_ARE:
            weights[ours].blocks = Blocks(kind, np.ascontiguousarray(rows))  # type: ignore[attr-defined]
    # Files of bfloat16 models keep the norms in fp32; they are numbers of bfloat16 all the same.
    matrices = [name for name, tensor in file.tensors.items() if len(tensor.shape) > 1]
    vectors = [tensor for tensor in weights.values() if tensor.ndim == 1]
    half = all(file.type_name(name) == "BF16" for name in matrices)
    if half and all(torch.equal(vector.bfloat16().float(), vector) for vector in vectors):
        weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    return weights


def permuted_heads(config: ModelConfig, name: str) -> int:
    """The heads whose rows have another order in a GGUF file, for a tensor of ours; 0 for most."""
    if config.architecture not in _PERMUTED:
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0)


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from halves to neighbouring pairs: in each head, row i and row i + d/2 come together.

    Args:
        array: (heads * d, ...), half-rotation layout.
    """
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """The opposite of `permute`: from neighbouring pairs to halves."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
