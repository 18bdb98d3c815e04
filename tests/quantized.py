"""Weights as int8 and int4 store them, in plain torch: what `kernels/pack.cpp` is compared with."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from smolforge.generation.quantize import BLOCK, search_grids, values_on_grid
from smolforge.generation.runners.cpu import Precision


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
    """values (N, K) uint8 in 0..15, scales and minima (N, K / 32) in half precision: weight = value * scale + minimum."""

    values: Tensor
    scales: Tensor
    minima: Tensor

    def dequantize(self) -> Tensor:
        """The weights (N, K) in fp32."""
        blocks = self.values.float().unflatten(1, (-1, BLOCK))
        return (blocks * self.scales.float()[..., None] + self.minima.float()[..., None]).flatten(1)


Weight = Tensor | Int8 | Int4


def to_int8(weight: Tensor) -> Int8:
    """Quantize (N, K) weights, one scale per row."""
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return Int8((weight * inverse[:, None]).round_().to(torch.int8), scales)


def to_int4(weight: Tensor) -> Int4:
    """Quantize (N, K) weights, K padded with zeros to a multiple of 32."""
    missing = -weight.shape[1] % BLOCK
    counts = torch.nn.functional.pad(torch.ones(weight.shape[1]), (0, missing)).view(-1, BLOCK)
    blocks = torch.nn.functional.pad(weight.float(), (0, missing)).unflatten(1, (-1, BLOCK))
    scales, minima = search_grids(blocks, counts, "Q4_1")
    values = values_on_grid(blocks, scales, minima).to(torch.uint8).flatten(1)
    return Int4(values, scales[..., 0].half(), minima[..., 0].half())


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
