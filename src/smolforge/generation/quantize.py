"""Weights with fewer bits: what each precision stores, how the numbers are rounded, and which precision is used.

int8: one scale per output row, symmetric, rounding to nearest. int4: one scale per row and group of 32 or 64
inputs, the scale of each group chosen among a few for the least squared error; the head and the embeddings stay
int8, since every token passes through them and no other layer can correct them. Norms stay in fp32 everywhere.
`kernels/pack.cpp` rounds to the same numbers; these functions are what its tests compare it with.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from smolforge.errors import RunFailed, unknown

Precision = Literal["fp32", "bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
INT4_GROUP = 32
# Weights this small are read from a cache: fewer bits would cost accuracy and save no time.
SMALL = 32 << 20


@dataclasses.dataclass(frozen=True)
class Int8:
    """values (N, K) int8 and scales (N,) fp32: weight = value * scale."""

    values: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """The weights (N, K) in fp32."""
        return self.values.float() * self.scales[:, None]


@dataclasses.dataclass(frozen=True)
class Int4:
    """values (N, K) uint8 in 0..15 and scales (N, K / group) bf16: weight = (value - 8) * scale."""

    values: Tensor
    scales: Tensor
    group: int

    def dequantize(self) -> Tensor:
        """The weights (N, K) in fp32."""
        centred = self.values.float().unflatten(1, (-1, self.group)) - 8
        return (centred * self.scales.float()[..., None]).flatten(1)


Weight = Tensor | Int8 | Int4


def to_int8(weight: Tensor) -> Int8:
    """Quantize (N, K) weights, one scale per row."""
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return Int8((weight * inverse[:, None]).round_().to(torch.int8), scales)


def to_int4(weight: Tensor, group: int = INT4_GROUP) -> Int4:
    """Quantize (N, K) weights, K padded with zeros to a multiple of `group`, one bf16 scale per row and group."""
    weight = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    # The value of greatest size becomes -8, which has no positive counterpart; a slightly smaller range trades that
    # value's error for finer steps of all others.
    peak = weight.gather(2, weight.abs().argmax(2, keepdim=True))
    best_scale, best_error = torch.zeros_like(peak), torch.full_like(peak, torch.inf)
    for divisor in (-8.0, -7.6, -7.2, -6.8, 7.0, -8.6):
        scale = (peak / divisor).bfloat16().float()
        values = _nearest4(weight, scale)
        error = (values * scale - weight).square_().sum(2, keepdim=True)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    values = _nearest4(weight, best_scale) + 8
    return Int4(values.to(torch.uint8).flatten(1), best_scale[..., 0].bfloat16(), group)


def _nearest4(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / torch.where(scale == 0, 1, scale)).round_().clamp_(-8, 7)


def quantize(weight: Tensor, precision: Precision, *, head: bool = False) -> Weight:
    """A matrix (N, K) as `precision` stores it.

    Args:
        head: the matrix is the head or the embedding, which int4 leaves at int8.
    """
    if precision == "fp32":
        return weight.float()
    if precision == "bf16":
        return weight.bfloat16()
    if precision == "int8" or head:
        return to_int8(weight)
    return to_int4(weight)


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
