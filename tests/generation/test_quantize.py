"""Four bits per weight: the search for scales and minima, in C++ and in torch, and rounding by what layers see."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from tiny_llama import make_model

from smolforge import kernels
from smolforge.generation import quantize
from smolforge.generation.quantize import BLOCK_BYTES, calibrate, quantize_blocks
from smolforge.generation.runners import select_runner
from smolforge.gguf_file import blocks_of


def numbers(blocks: np.ndarray, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


def plain(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The gguf package's own rounding, without a search."""
    return numbers(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]), kind)


def draw(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_a_search_leaves_less_error_than_the_whole_range(kind: str) -> None:
    weight = draw(70, 256)
    found, before = numbers(quantize_blocks(weight, kind), kind), plain(weight, kind)
    assert (found - weight).norm() < {"Q4_0": 0.96, "Q4_1": 0.91}[kind] * (before - weight).norm()
    importance = torch.ones(256)
    importance[::7] = 100.0
    weighed = numbers(quantize_blocks(weight, kind, importance), kind)
    assert (weighed - weight)[:, ::7].norm() < 0.85 * (found - weight)[:, ::7].norm()


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_what_is_on_a_grid_stays_there(kind: str) -> None:
    weight = plain(draw(32, 128), kind)
    found = numbers(quantize_blocks(weight, kind), kind)
    assert torch.allclose(found, weight, rtol=0, atol=float(weight.abs().max()) * 2**-10), "but for scales in fp16"


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_blocks_of_one_number_and_of_none(kind: str) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 0.25
    weight[2, 5] = -3e-7  # below what half precision holds with all its digits
    found = numbers(quantize_blocks(weight, kind), kind)
    assert torch.equal(found[0], weight[0]) and torch.allclose(found[1], weight[1], rtol=1e-3)
    assert torch.allclose(found[2], weight[2], atol=3e-7)


@pytest.mark.skipif(kernels.unavailable() is not None, reason="the native code cannot be built here")
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_torch_finds_the_same_blocks(kind: str, weighed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = draw(45, 192), (draw(1, 192, 1)[0] ** 2 if weighed else None)
    native = quantize_blocks(weight, kind, importance)

    def missing() -> None:
        raise kernels.NativeUnavailable("turned off")

    monkeypatch.setattr(quantize, "library", missing)
    torchs = quantize_blocks(weight, kind, importance)
    same = (native == torchs).reshape(-1, BLOCK_BYTES[kind]).all(1).mean()
    assert same > 0.97, "but for ties that rounding decides otherwise"
    error = [float((numbers(blocks, kind) - weight).norm()) for blocks in (native, torchs)]
    assert error[0] == pytest.approx(error[1], rel=2e-3)


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_calibrated_matrices_change_the_outputs_less(kind: str) -> None:
    model = make_model("one-kv", gain=0.1)
    ids = torch.randint(0, 30, (8, 64), generator=torch.Generator().manual_seed(3))  # few words: inputs go together
    other = torch.randint(0, 30, (4, 64), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(other)
    rounded = make_model("one-kv", gain=0.1)
    linears = [part for part in rounded.model.layers.modules() if isinstance(part, torch.nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            linear.weight.copy_(numbers(quantize_blocks(linear.weight, kind), kind))
        before = (rounded(other) - expected).norm()
    calibrate(model, ids, kind)
    with torch.no_grad():
        after = (model(other) - expected).norm()
    assert after < 0.9 * before
    for name, parameter in model.named_parameters():
        blocks = blocks_of(parameter)
        if "layers" not in name or parameter.ndim < 2:
            assert blocks is None
            continue
        assert blocks is not None and blocks.kind == kind
        assert torch.allclose(numbers(blocks.rows, kind), parameter, rtol=1e-6, atol=1e-8), name
    runner, _ = select_runner(model, "int4")
    assert "int4" in runner.name or kernels.unavailable()
