"""New weights.

Matrices and the embedding are normal with `initializer_range`; the two projections that write into the residual
stream are scaled by 1 / sqrt(2 L), so that its variance does not grow with depth (Radford et al. 2019, GPT-2).
In a tied model zero-initialised residual projections would give a first loss of 24 instead of ln V = 10.8.
"""

from __future__ import annotations

import torch
from torch import nn

RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialise(model: nn.Module, *, std: float, layers: int, seed: int = 0) -> None:
    """Fill all parameters in place; equal seeds give equal weights whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0)  # the weights of norms
            continue
        scale = std / (2 * layers) ** 0.5 if name.endswith(RESIDUAL_PROJECTIONS) else std
        # Drawn on the CPU, so that a seed means the same weights on every device.
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
