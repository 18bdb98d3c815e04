"""AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), in the precision of the weights or with moments in 8 bits."""

from __future__ import annotations

import torch
from torch import nn

from smolforge.config import OptimizerConfig
from smolforge.errors import BadInput
from smolforge.training.optim import parameter_groups, register
from smolforge.training.optim.stochastic_adamw import StochasticAdamW


@register("adamw")
def build_adamw(model: nn.Module, config: OptimizerConfig, *, update: str) -> torch.optim.Optimizer:
    """torch's fused AdamW, where one kernel updates all parameters; weights in bf16 are rounded stochastically."""
    groups = parameter_groups(model, config)
    if any(p.dtype == torch.bfloat16 for p in model.parameters()):
        return StochasticAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, update=update)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@register("adamw8bit")
def build_adamw8bit(model: nn.Module, config: OptimizerConfig, *, update: str) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861), from bitsandbytes."""
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError:
        raise BadInput(
            "adamw8bit needs the bitsandbytes library",
            field="optimizer.name",
            hint="pip install bitsandbytes, or use adamw.",
        ) from None
    if next(model.parameters()).device.type != "cuda":
        raise BadInput("adamw8bit needs a CUDA device", field="optimizer.name", hint="Use adamw.")
    groups = parameter_groups(model, config)
    return bitsandbytes.optim.AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
