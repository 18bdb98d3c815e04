"""The shape of a Llama in Hugging Face's config.json and back, for transformers 4 and 5.

Reading refuses by name and value what smolforge does not have, which would load without an error and write nonsense.
"""

from __future__ import annotations

import json
from typing import Any

from smolforge.config import ModelConfig
from smolforge.errors import BadInput

# Far above any model of this kind, far below what would exhaust memory before the weights are looked at.
_REQUIRED = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
}  # fmt: skip
_OPTIONAL = {"num_key_value_heads": 4096, "head_dim": 1 << 14, "max_position_embeddings": 1 << 26}
_SWITCHES = ("rope_interleaved", "is_encoder_decoder", "add_cross_attention")
# Keys that must be absent, null or have one of these values for the model to be what smolforge computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "quantization_config": (), "sliding_window": (),
    **dict.fromkeys(_SWITCHES, (False,)),
}  # fmt: skip
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_WHY = {"quantization_config": "give the unquantized weights; smolforge quantizes when it loads"}


def llama_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that follow from the shape; rope in both spellings (transformers 4: rope_theta)."""
    scaling = config.rope_scaling.model_dump() if config.rope_scaling else {"rope_type": "default"}
    return {
        # Its fields have Hugging Face's names.
        **config.model_dump(exclude={"architecture", "no_rope_layer_interval"}),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        "use_cache": True,
    }


def full_attention_fields(values: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """`llama_fields` for architectures that may have a sliding window: an unused one is ignored, a used one refused."""
    if values.get("use_sliding_window"):
        raise unsupported("use_sliding_window", True, "Supported: false.")
    return llama_fields({**defaults, **values, "sliding_window": None})


def llama_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ModelConfig from an untrusted config.json; what is absent has transformers' default.

    Raises:
        BadInput: a key is missing, has a wrong type or value, or asks for what smolforge does not have.
    """
    for key, allowed in _ONLY.items():
        value = values.get(key)
        if value is not None and not any(value == option and type(value) is type(option) for option in allowed):
            right = " or ".join(map(json.dumps, allowed))
            raise unsupported(key, value, _WHY.get(key) or f"Supported: {right or 'none'}.")
    fields: dict[str, Any] = _rope(values)
    for key, limit in (_REQUIRED | _OPTIONAL).items():
        value = values.get(key)
        if value is None and key in _OPTIONAL:
            continue
        if value is None:
            raise BadInput("is missing", field=key)
        if type(value) is not int or not 1 <= value <= limit:
            raise BadInput(f"{_shown(value)} is not a whole number from 1 to {limit:,}", field=key)
        fields[key] = value
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("max_position_embeddings", 2048)
    for key, default in (("rms_norm_eps", 1e-6), ("initializer_range", 0.02)):
        fields[key] = default if values.get(key) is None else _positive(values[key], key)
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        value = values.get(key)
        if value is not None and type(value) is not bool:
            raise BadInput(f"{_shown(value)} is neither true nor false", field=key)
        fields[key] = bool(value)
    return fields


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """The base of the rotation and its scaling, from either spelling; a scaling other than Llama 3's is refused."""
    scalings: list[dict[str, Any] | None] = []
    thetas = {} if values.get("rope_theta") is None else {"rope_theta": values["rope_theta"]}
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise BadInput(f"{_shown(rope)} is neither null nor an object", field=key)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            message = f"scaling of type {_shown(kind)} is not supported"
            raise BadInput(message, field=key, hint="Supported: default (none) and llama3.")
        if rope.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = rope["rope_theta"]
        scalings.append({"rope_type": kind, **{name: rope.get(name) for name in _LLAMA3}} if kind == "llama3" else None)
        if kind == "llama3":
            given = {name: _positive(rope.get(name), f"{key}.{name}") for name in _LLAMA3}
            if given["high_freq_factor"] <= given["low_freq_factor"]:
                raise BadInput("must be larger than low_freq_factor", field=f"{key}.high_freq_factor")
        neutral = {"factor": 1, "partial_rotary_factor": 1}
        for inner, value in rope.items():
            if kind == "llama3" and inner in _LLAMA3:
                continue
            if inner not in ("rope_type", "type", "rope_theta") and value is not None and value != neutral.get(inner):
                raise unsupported(f"{key}.{inner}", value, "Only unscaled rotation is.")
    if values.get("partial_rotary_factor") not in (None, 1):
        raise unsupported("partial_rotary_factor", values["partial_rotary_factor"])
    checked = {key: _positive(value, key) for key, value in thetas.items()}
    if len(set(checked.values())) > 1:
        raise BadInput(f"is given twice with different values: {checked}", field="rope_theta")
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise BadInput(f"is given twice with different values: {scalings}", field="rope_scaling")
    theta = next(iter(checked.values()), 10_000.0)
    return {"rope_theta": theta, "rope_scaling": scalings[0] if scalings else None}


def _positive(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e18:
        raise BadInput(f"{_shown(value)} is not a positive number", field=key)
    return float(value)


def unsupported(key: str, value: Any, hint: str | None = None) -> BadInput:
    """The error for a key of config.json whose value smolforge does not have."""
    return BadInput(f"{_shown(value)} is not supported", field=key, hint=hint)


def _shown(value: Any) -> str:
    """A value of a JSON file as an error message shows it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
