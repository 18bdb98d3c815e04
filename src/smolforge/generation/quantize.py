"""Precisions of the CPU runner's weights, and the choice of one.

int8: one scale per output row, symmetric, rounding to nearest. int4: one scale per row and group of 32 inputs, the
scale of each group chosen among a few for the least squared error; the head and the embeddings stay int8, since every
token passes through them and no other layer can correct them. Norms stay in fp32 everywhere. The code is
`kernels/pack.cpp`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch.nn import Module

from smolforge.errors import RunFailed, unknown

Precision = Literal["fp32", "bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
INT4_GROUP = 32
# Weights this small are read from a cache: fewer bits would cost accuracy and save no time.
SMALL = 32 << 20


def check_finite(module: Module) -> None:
    """Check that all weights are finite before they are quantized, since no integer stands for NaN.

    Raises:
        RunFailed: they are not; names the first.
    """
    for name, parameter in module.named_parameters():
        if not math.isfinite(parameter.detach().sum(dtype=torch.float32)):
            raise RunFailed(
                f"{name} contains NaN or infinite values, which quantizing would hide",
                field="quantize",
                hint="The weights are damaged, or training diverged; fp32 and bf16 keep them as they are.",
            )


def choose_precision(wanted: str, parameters: int, device: str) -> tuple[Precision, str]:
    """The precision for `wanted` (one of them or "auto"), and the reason in words.

    Args:
        wanted: what the user asked for.
        parameters: number of weights.
        device: type of the device that runs them.

    Raises:
        BadInput: there is no such precision.
    """
    if wanted not in ("auto", *PRECISIONS):
        raise unknown("precision", wanted, ["auto", *PRECISIONS], field="quantize")
    if wanted in ("int8", "int4") and device != "cpu":
        return "bf16", f"bf16 instead of {wanted}, which only the CPU runner has"
    if wanted in PRECISIONS:
        return wanted, f"{wanted} (as asked)"
    if device != "cpu":
        return "bf16", "bf16 (half the bytes of fp32, at no measurable loss)"
    if 4 * parameters <= SMALL:
        size = 4 * parameters >> 20
        return "fp32", f"fp32 ({size} MiB of weights fit in the CPU cache; quantizing would not be faster)"
    return "int8", "int8 (the bytes of the weights limit decoding; loss within 0.5%, see smolforge eval --quantize)"
