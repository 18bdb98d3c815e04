"""Weights as int8 and int4 store them, in plain torch: what `kernels/pack.cpp` is compared with."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from smolforge.generation.runners.cpu import INT4_GROUP, Precision


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
