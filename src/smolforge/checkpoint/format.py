"""A checkpoint is a model: the Hugging Face directory, written so that transformers 4 and 5 both read it.

`write_model` writes config.json, generation_config.json, model.safetensors, the tokenizer and the card.
`read_config` reads any Llama directory, and refuses by name and value what smolforge does not have, because a model
that computes something else would load silently and write nonsense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from smolforge.checkpoint.weights import WEIGHTS, read_json, read_weights
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from smolforge.tokenizer import Tokenizer

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"
__all__ = ["check_weights", "read_config", "read_generation_defaults", "read_weights", "write_model"]


@dataclass(frozen=True)
class Architecture:
    """How one of our architectures is named in config.json."""

    model_type: str
    class_name: str


# By ModelConfig.architecture. The recreation has a model_type of its own, so that no library takes it for a Llama.
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM"),
    "recreation": Architecture("smolforge_recreation", "SmollmV2Recreation"),
}
# Far above any model of this kind, far below what would exhaust memory before the weights are looked at.
LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 26,
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Keys whose value must be one of these for the model to be what smolforge computes (None: absent).
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0, 0.0),
    "rope_interleaved": (None, False),
    "quantization_config": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "sliding_window": (None,),
}
_WHY = {
    "attention_dropout": "smolforge has no dropout; set it to 0 to continue this model without",
    "quantization_config": "give the unquantized weights; smolforge quantizes when it loads",
}


def write_model(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    card: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory.

    Args:
        directory: made if missing; files of the same names are replaced.
        state: the model's state dict, on any device. The head of a tied model is left out.
        card: the text of README.md; no card where empty.
        dtype: floating type to store; that of `state` unless given.

    Raises:
        BadInput: the tokenizer has more tokens than the model.
        CheckpointError: `state` is not a state dict of `config`; the tensor is named.
    """
    from safetensors.torch import save_file

    check_vocabulary(config, tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    weights = check_weights(config, state)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    # One key only: the library writes metadata in an order that changes from run to run.
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    stored = next(iter(tensors.values())).dtype
    specials = {
        "bos_token_id": tokenizer.eos_id if (bos := _bos_id(tokenizer)) is None else bos,
        "eos_token_id": tokenizer.eos_id,
    }
    _write_json(directory / CONFIG, describe(config, str(stored).removeprefix("torch."), specials))
    _write_json(directory / GENERATION_CONFIG, specials)
    tokenizer.save(directory)
    if card:
        (directory / CARD).write_text(card, encoding="utf-8")


def describe(config: ModelConfig, dtype: str, specials: Mapping[str, int]) -> dict[str, Any]:
    """config.json of a model: both spellings of rope (transformers 4: rope_theta) and of the type (torch_dtype)."""
    kind = ARCHITECTURES[config.architecture]
    return {
        "architectures": [kind.class_name],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **specials,
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": kind.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids that the model has no row for.

    Raises:
        BadInput: with both sizes.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise BadInput(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model only {config.vocab_size:,}",
            field="model.vocab_size",
            hint=f"It must be at least {tokenizer.vocab_size}.",
        )


def check_weights(config: ModelConfig, weights: Mapping[str, Tensor], where: str = "") -> dict[str, Tensor]:
    """The tensors that a model of `config` needs, in the model's order; nothing is copied.

    A tied model's own copy of the head is dropped where it equals the embedding.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or not of a floating type.
    """
    import torch

    from smolforge.model.registry import build

    given = {name: tensor for name, tensor in weights.items() if not name.endswith(".rotary_emb.inv_freq")}
    expected = build(config, device="meta", seed=None).state_dict()
    if config.tie_word_embeddings and "lm_head.weight" in given and "lm_head.weight" not in expected:
        head, embedding = given.pop("lm_head.weight"), given.get("model.embed_tokens.weight")
        if embedding is not None and (head.shape != embedding.shape or not torch.equal(head, embedding)):
            raise CheckpointError(
                "tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', though the embeddings are tied",
                field=where or None,
                hint="Set tie_word_embeddings to false in config.json if the head is one of its own.",
            )

    def bad(message: str) -> CheckpointError:
        return CheckpointError(message, field=where or None, hint="The weights do not belong to this config.json.")

    missing = [name for name in expected if name not in given]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise bad(f"tensor {missing[0]!r}{more} is missing")
    for name, tensor in given.items():
        if name not in expected:
            raise bad(f"tensor {name!r} is none of this model")
        if tensor.shape != expected[name].shape:
            raise bad(f"tensor {name!r} is {list(tensor.shape)}, expected {list(expected[name].shape)}")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise bad(f"tensor {name!r} is {tensor.dtype}; float32, bfloat16 and float16 can be used")
    return {name: given[name] for name in expected}


def read_config(directory: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face directory.

    Raises:
        CheckpointError: there is no config.json, it is damaged, or it describes what smolforge does not have.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {CONFIG}", hint="A model directory needs one.")
    values = read_json(path, limit=1 << 20)

    def bad(key: str, message: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(message, field=f"{path}: {key}", hint=hint)

    name = _architecture(values, bad)
    for key, allowed in _ONLY.items():
        value = values.get(key)
        if not any(value is option or (value == option and type(value) is type(option)) for option in allowed):
            right = " or ".join(json.dumps(option) for option in allowed if option is not None)
            raise bad(key, f"{_short(value)} is not supported", _WHY.get(key) or f"Supported: {right or 'none'}.")
    fields: dict[str, Any] = {"architecture": name, "rope_theta": _rope_theta(values, bad)}
    for key, limit in LIMITS.items():
        value = values.get(key)
        if value is None:
            if key in _REQUIRED:
                raise bad(key, "is missing")
            continue
        if type(value) is not int or not 1 <= value <= limit:
            raise bad(key, f"{_short(value)} is not a whole number from 1 to {limit:,}")
        fields[key] = value
    # What is absent has the value that transformers' LlamaConfig gives it.
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("max_position_embeddings", 2048)
    for key, default in (("rms_norm_eps", 1e-6), ("initializer_range", 0.02)):
        fields[key] = _positive(values.get(key), default, key, bad)
    tied = values.get("tie_word_embeddings")
    if tied is not None and type(tied) is not bool:
        raise bad("tie_word_embeddings", f"{_short(tied)} is neither true nor false")
    fields["tie_word_embeddings"] = bool(tied)
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        text = str(first.get("ctx", {}).get("error", first["msg"]))
        raise CheckpointError(text, field=str(path)) from None


def _architecture(values: dict[str, Any], bad: Any) -> str:
    kinds = {kind.model_type: name for name, kind in ARCHITECTURES.items()}
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in kinds:
        raise bad("model_type", f"{_short(model_type)} is not supported", f"Supported: {', '.join(kinds)}.")
    name = kinds[model_type]
    classes, ours = values.get("architectures"), ARCHITECTURES[name].class_name
    if classes is not None and classes != [ours]:
        raise bad("architectures", f"{_short(classes)} is not supported", f"Supported: {ours}.")
    return name


def _rope_theta(values: dict[str, Any], bad: Any) -> float:
    """The base of the rotation, from either spelling; any scaling of it is refused."""
    thetas = {} if values.get("rope_theta") is None else {"rope_theta": values["rope_theta"]}
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise bad(key, f"{_short(rope)} is neither null nor an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise bad(key, f"scaling of type {_short(kind)} is not supported", "Only unscaled rotation is.")
        if rope.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = rope["rope_theta"]
        neutral = {"factor": 1, "partial_rotary_factor": 1}
        for inner, value in rope.items():
            if inner not in ("rope_type", "type", "rope_theta") and value is not None and value != neutral.get(inner):
                raise bad(f"{key}.{inner}", f"{_short(value)} is not supported", "Only unscaled rotation is.")
    if values.get("partial_rotary_factor") not in (None, 1):
        raise bad("partial_rotary_factor", f"{_short(values['partial_rotary_factor'])} is not supported")
    checked = {key: _positive(value, 1.0, key, bad) for key, value in thetas.items()}
    if len(set(checked.values())) > 1:
        raise bad("rope_theta", f"is given twice with different values: {checked}")
    return next(iter(checked.values()), 10_000.0)


def _positive(value: Any, default: float, key: str, bad: Any) -> float:
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value < 1e18 or not math.isfinite(value):
        raise bad(key, f"{_short(value)} is not a positive number")
    return float(value)


# What generation_config.json may say that generation here can use: the types, and the range of numbers.
_GENERATION = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "top_k": (0, 1 << 24), "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0), "repetition_penalty": (0.0, 100.0), "max_new_tokens": (1, 1 << 26),
}  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation_defaults(directory: Path) -> dict[str, Any]:
    """The sampling defaults and special ids in generation_config.json, as far as generation here knows them.

    Keys, each only where the file gives it: temperature, top_p, top_k, min_p, typical_p, repetition_penalty,
    max_new_tokens, do_sample, bos_token_id, eos_token_id (an id or a list), pad_token_id. Empty without the file.

    Raises:
        CheckpointError: the file is damaged, or a value is out of its range.
    """
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return {}
    values, found = read_json(path, limit=1 << 20), {}
    for key, (low, high) in _GENERATION.items():
        value = values.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not low <= value <= high:
            raise CheckpointError(f"{_short(value)} is not from {low} to {high}", field=f"{path}: {key}")
        found[key] = value
    for key in _TOKEN_IDS:
        value = values.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is None:
            continue
        if not all(type(i) is int and -1 <= i < LIMITS["vocab_size"] for i in ids):
            raise CheckpointError(f"{_short(value)} is no token id", field=f"{path}: {key}")
        found[key] = value
    if type(values.get("do_sample")) is bool:
        found["do_sample"] = values["do_sample"]
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _bos_id(tokenizer: Tokenizer) -> int | None:
    token = tokenizer.config.get("bos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.backend.token_to_id(text) if isinstance(text, str) else None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
