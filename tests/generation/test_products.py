"""torch's packed products on rows of any number and size, in Python; that TorchScript agrees is in test_runners.py."""

from __future__ import annotations

import pytest
import torch

from smolforge.generation.arena import Arena
from smolforge.generation.products import Int8Rounding, Int8Unpacking, Plain, one_row, product
from smolforge.generation.quantize import PRECISIONS, Int4, Int8, Weight, quantize, to_int8

SHAPES = [(96, 64), (48, 96), (33, 72)]  # of all kernels; with a tail; of those that take any shape
ERROR = {"fp32": 1e-6, "bf16": 0.01, "int8": 0.03, "int4": 0.01}
HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines


def whole(weight: Weight, inputs: int) -> torch.Tensor:
    return (weight.dequantize() if isinstance(weight, Int8 | Int4) else weight.float())[:, :inputs]


def row_errors(y: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (y - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 3, 20, 40])
@pytest.mark.parametrize("hardware", [True, False], ids=["bf16", "no-bf16"])
def test_products_are_those_of_the_packed_weight(monkeypatch, precision, shape, rows, hardware):
    monkeypatch.setattr("smolforge.generation.products.multiplies_bf16", lambda: hardware)
    generator = torch.Generator().manual_seed(rows)
    weight = quantize(torch.randn(shape, generator=generator), precision)
    x = torch.randn(rows, shape[1], generator=generator)
    y = product(weight, shape[1], Arena())(x)
    assert y.shape == (rows, shape[0]) and y.is_contiguous()
    assert row_errors(y, x @ whole(weight, shape[1]).T).max() < ERROR[precision]


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_int8_without_fbgemm(rows):
    weight = to_int8(torch.randn(48, 96, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1))
    assert row_errors(Int8Unpacking(weight, Arena())(x), x @ weight.dequantize().T).max() < ERROR["bf16"]


@pytest.mark.skipif(not HAS_FBGEMM, reason="fbgemm is for x86")
@pytest.mark.parametrize("narrow", [False, True])
def test_a_large_row_takes_no_bits_from_a_small_one(narrow):
    weight = to_int8(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1e-4, 1e4, 0.0])[:, None]
    rounding = Int8Rounding(weight)
    rounding.narrow = narrow
    y = rounding(x)
    assert torch.equal(y[3], torch.zeros(64))
    assert row_errors(y[:3], x[:3] @ weight.dequantize().T).max() < (0.04 if narrow else 0.02)


def test_one_row_leaves_the_setting_as_it_was():
    before = torch._C._get_mkldnn_enabled()
    with pytest.raises(KeyError), one_row():
        assert not torch._C._get_mkldnn_enabled()
        raise KeyError
    assert torch._C._get_mkldnn_enabled() == before


def test_weights_are_kept_once():
    arena = Arena()
    weight = torch.randn(64, 64)
    held = Plain(weight, arena).weight
    assert held.data_ptr() != weight.data_ptr() and held.data_ptr() % 64 == 0
