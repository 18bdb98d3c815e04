"""New weights.

Matrices and the embedding are normal with `initializer_range`; the two projections that write into the residual
stream are scaled by 1 / sqrt(2 L), so that its variance does not grow with depth (Radford et al. 2019, GPT-2).
In a tied model zero-initialised residual projections would give a first loss of 24 instead of ln V = 10.8.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def initialise(model: nn.Module, *, std: float, layers: int, residual: tuple[str, ...], seed: int = 0) -> None:
    """Fill all parameters in place; equal seeds give equal weights whatever was drawn before.

    Args:
        std: standard deviation of a matrix.
        layers: L.
        residual: what the names of projections into the residual stream end in.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # else the weight of a norm
            continue
        scale = std / (2 * layers) ** 0.5 if name.endswith(residual) else std
        # Drawn on the CPU, so that a seed means the same weights on every device.
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
