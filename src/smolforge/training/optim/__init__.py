"""Optimizers: which parameter is updated how.

Matrices and embeddings are decayed, vectors are not. The groups together own every parameter exactly once, and that
is checked. A device flag (`found_inf` of torch's fused optimizers) lets an update be skipped without asking the host.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from smolforge.config import OptimizerConfig
from smolforge.errors import BadInput
from smolforge.model.architecture import CausalLM
from smolforge.training.optim.muon import Muon
from smolforge.training.optim.stochastic_adamw import StochasticAdamW


def parameter_groups(model: CausalLM, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters by their learning-rate factor and decay, in the model's order.

    The first pattern of `config.groups` found in a name decides; `lr` there is a factor, `weight_decay` a value.
    """
    hidden = model.hidden_matrices() if config.name == "muon" else set()
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        chosen = next((values for pattern, values in config.groups.items() if re.search(pattern, name)), {})
        decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        key = (float(chosen.get("lr", 1.0)), float(chosen.get("weight_decay", decay)), name in hidden)
        groups.setdefault(key, []).append(parameter)
    owned = [id(p) for members in groups.values() for p in members]
    everything = {id(p) for p in model.parameters()}
    assert len(owned) == len(set(owned)) and set(owned) == everything, "each parameter has exactly one group"
    return [
        {"params": members, "factor": lr, "weight_decay": decay, "orthogonal": orthogonal}
        for (lr, decay, orthogonal), members in groups.items()
    ]


def build_optimizer(model: CausalLM, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `config` over all parameters of `model`.

    Raises:
        BadInput: the optimizer needs a library that is not installed, or another device.
    """
    return _OPTIMIZERS[config.name](model, config, device)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next update; each group scales it by its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def _adamw(model: CausalLM, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), fused: one kernel updates all parameters.

    Weights in bf16 are rounded stochastically, see `stochastic_adamw.py`."""
    if any(p.dtype == torch.bfloat16 for p in model.parameters()):
        return StochasticAdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def _muon(model: CausalLM, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Muon over the layers' matrices, AdamW over the rest, see `muon.py`."""
    if any(p.dtype == torch.bfloat16 for p in model.parameters()):
        raise BadInput(
            "muon keeps its weights in fp32",
            field="optimizer.name",
            hint="Use adamw, or training.precision=bf16, which computes in bf16 over fp32 weights.",
        )
    return Muon(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, momentum=config.momentum
    )


def _adamw8bit(model: CausalLM, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861) from bitsandbytes."""
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError:
        raise BadInput(
            "adamw8bit needs the bitsandbytes library",
            field="optimizer.name",
            hint="pip install bitsandbytes, or use adamw.",
        ) from None
    if device.type != "cuda":
        raise BadInput("adamw8bit needs a CUDA device", field="optimizer.name", hint="Use adamw.")
    return bitsandbytes.optim.AdamW8bit(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps
    )


_OPTIMIZERS: dict[str, Callable[[CausalLM, OptimizerConfig, torch.device], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "muon": _muon,
}
