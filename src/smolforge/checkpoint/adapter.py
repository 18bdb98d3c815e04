"""Adapters on disk, in peft's form: adapter_config.json and adapter_model.safetensors.

A LoRA run's checkpoints are models with the adapter merged, and hold the adapter itself in the folder `adapter`.
Format: https://huggingface.co/docs/peft (LoraConfig; names of the state dict).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge import hub
from smolforge.checkpoint.weights import read_safetensors, write_safetensors
from smolforge.config import LoraConfig
from smolforge.errors import CheckpointError
from smolforge.files import read_json
from smolforge.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = "adapter"  # the folder in a checkpoint of a LoRA run
_PREFIX = "base_model.model."
# What other adapters have besides two matrices of one rank; an adapter with one of these computes something else.
_OTHERS = {
    "bias": "none", "fan_in_fan_out": False, "use_dora": False, "lora_bias": False, "modules_to_save": None,
    "rank_pattern": {}, "alpha_pattern": {}, "trainable_token_indices": None, "target_parameters": None,
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter."""

    tensors: dict[str, Tensor]  # `lora_A.weight` (r, in), `lora_B.weight` (out, r) after the name of each projection
    scaling: float  # how many times their product is added to the projection's weight
    base: str | None  # the model that it belongs to, as its config names it

    def merge_into(self, weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The weights of the base with the adapter added, each in its own precision; CheckpointError for a misfit."""
        from smolforge.model.lora import merge

        merged = dict(weights)
        for name, first in self.tensors.items():
            module, kind, _ = name.rpartition(".lora_A.weight")
            if not kind:
                continue
            target, second = f"{module}.weight", self.tensors.get(f"{module}.lora_B.weight")
            weight = merged.get(target)
            if weight is None or second is None or (len(second), first.shape[1]) != tuple(weight.shape):
                found = "has no such tensor" if weight is None else f"has {list(weight.shape)} there"
                problem = f"the adapter's {name} ({list(first.shape)}) does not fit: {where} {found}"
                raise CheckpointError(problem, field="adapter", hint=f"It was made for {self.base or 'another model'}.")
            merged[target] = merge(weight, first, second, self.scaling)
        return merged


def is_adapter(path: Path) -> bool:
    """Whether a directory is an adapter and not a model."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def read_base(directory: Path) -> str:
    """The name of the model that an adapter belongs to; CheckpointError where its config names none."""
    base = read_json(directory / ADAPTER_CONFIG, limit=1 << 20).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        problem = f"{directory} is an adapter that does not say which model it belongs to"
        hint = f"Give the model, and this with --adapter: MODEL --adapter {directory}"
        raise CheckpointError(problem, field="model", hint=hint)
    return base


def find_adapter(path: Path, name: str) -> Path:
    """The adapter's directory at `path`: itself, or in a checkpoint; else that of the Hub id `name`, or an error."""
    for directory in (path, path / ADAPTER):
        if (directory / ADAPTER_CONFIG).is_file():
            return directory
    if not path.exists() and hub.is_model_id(name):
        return hub.fetch_model(name, patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS, *TOKENIZER_FILES])
    hint = "Give a LoRA run, one of its checkpoints, a directory that peft wrote, or a Hub id."
    raise CheckpointError(f"{name} holds no adapter: it has no {ADAPTER_CONFIG}", field="adapter", hint=hint)


def read_adapter(directory: Path) -> Adapter:
    """An adapter that peft or smolforge wrote; CheckpointError where it is damaged, or not plain LoRA."""
    path = directory / ADAPTER_CONFIG
    config = read_json(path, limit=1 << 20)
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{kind!r} is not supported", field=f"{path}: peft_type", hint="LORA is.")
    for key, plain in _OTHERS.items():
        if (value := config.get(key)) not in (plain, None, [], {}):
            raise CheckpointError(f"{json.dumps(value)[:200]} is not supported", field=f"{path}: {key}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError("r and lora_alpha must be numbers", field=str(path))
    found = read_safetensors(directory / ADAPTER_WEIGHTS)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}
    for name, tensor in tensors.items():
        place = 0 if name.endswith(".lora_A.weight") else 1
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or tensor.dim() != 2 or tensor.shape[place] != rank:
            problem = f"unexpected tensor {name!r} of shape {list(tensor.shape)} in an adapter of rank {rank}"
            raise CheckpointError(problem, field=str(directory / ADAPTER_WEIGHTS))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    base = config.get("base_model_name_or_path")
    return Adapter(tensors, scaling, base if isinstance(base, str) else None)


def write_adapter(directory: Path, config: LoraConfig, state: Mapping[str, Tensor], base: str) -> None:
    """Write an adapter as peft does; `state` has its tensors by their names in the model."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PREFIX}{name}": tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    write_safetensors(directory / ADAPTER_WEIGHTS, tensors, metadata={"format": "pt"})
    targets = config.target_modules
    if isinstance(targets, str):  # peft would put all-linear beside the head too
        targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in state})
    values: dict[str, Any] = {
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "modules_to_save": None,
        "peft_type": "LORA", "r": config.r, "target_modules": targets, "task_type": "CAUSAL_LM",
        "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    (directory / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
