"""Four bits per weight: blocks of GGUF, 32 weights of a row with a scale and a minimum (Q4_1) or a scale alone (Q4_0).

`quantize_blocks` searches for the scales and minima with the least squared error. `calibrate` lets text decide as well:
it runs the model and rounds each matrix for the inputs that it sees (GPTQ, Frantar et al. 2022, arXiv:2210.17323). What
rounding a column does to the outputs is made good in the columns after it, as far as their inputs go together.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smolforge.errors import RunFailed
from smolforge.gguf_file import Blocks
from smolforge.kernels import NativeUnavailable, library

BLOCK = 32  # weights that share a scale
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20}
_DAMPING = 0.01  # of the mean square of the inputs, added to each: what few tokens say of rare inputs is not trusted
_CUTS, _FITS = 4, 2  # as in kernels/quantize.h


def check_finite(module: nn.Module) -> None:
    """Raise RunFailed for the first weight with NaN or infinite values: no integer stands for them."""
    for name, parameter in module.named_parameters():
        if not math.isfinite(parameter.detach().sum(dtype=torch.float32)):
            hint = "The weights are damaged, or training diverged; fp32 and bf16 keep them as they are."
            problem = f"{name} contains NaN or infinite values, which quantizing would hide"
            raise RunFailed(problem, field="quantize", hint=hint)


def quantize_blocks(weight: Tensor, kind: str, importance: Tensor | None = None) -> np.ndarray:
    """Blocks (N, bytes) of fp32 weights (N, K), K a multiple of 32.

    Args:
        kind: Q4_0 or Q4_1.
        importance: by how much the squared errors of a column count, (K,); all alike unless given.
    """
    weight = weight.detach().float().contiguous()
    importance = torch.ones(weight.shape[1]) if importance is None else importance.float().contiguous()
    rows, columns = weight.shape
    blocks = np.empty((rows, columns // BLOCK * BLOCK_BYTES[kind]), np.uint8)
    try:
        native: Any = library()
    except NativeUnavailable:
        scales, minima = search_grids(weight.unflatten(1, (-1, BLOCK)), importance.view(-1, BLOCK), kind)
        values = values_on_grid(weight.unflatten(1, (-1, BLOCK)), scales, minima)
        return pack_blocks(values.numpy(), scales.numpy(), minima.numpy(), kind)
    native.smolforge_quantize(
        int(kind == "Q4_1"), rows, columns, ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(importance.data_ptr()),
        ctypes.c_void_p(blocks.ctypes.data), torch.get_num_threads(),
    )  # fmt: skip
    return blocks


def search_grids(weight: Tensor, importance: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Scales and minima (..., 1) of weights (..., 32), as kernels/quantize.h finds them."""
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    peak = torch.where(high > -low, high, low)
    total, weighted = importance.sum(-1, keepdim=True), (importance * weight).sum(-1, keepdim=True)
    best = torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low)
    for i in range(_CUTS * _CUTS):
        below, above, divisor = 0.06 * (i // _CUTS), 0.06 * (i % _CUTS), 0.25 * i - 8.8 if i < 12 else 12.4 - 0.4 * i
        scale, minimum = (high - low) * ((1 - below - above) / 15), low + below * (high - low)
        if kind == "Q4_0":
            scale = peak / divisor
        for _ in range(_FITS + 1):
            scale = _half(scale)
            minimum = _half(minimum) if kind == "Q4_1" else -8 * scale
            values = values_on_grid(weight, scale, minimum)
            error = (importance * (values * scale + minimum - weight) ** 2).sum(-1, keepdim=True)
            better = error < best[0]
            best = tuple(torch.where(better, a, b) for a, b in zip((error, scale, minimum), best, strict=True))
            q, qq, qw = ((importance * x).sum(-1, keepdim=True) for x in (values, values * values, values * weight))
            if kind == "Q4_0":
                squares = qq - 16 * q + 64 * total
                scale = torch.where(squares > 0, (qw - 8 * weighted) / squares, scale)
                continue
            determinant = total * qq - q * q
            solvable = determinant > 1e-6 * total * qq
            fit = (total * qw - q * weighted) / determinant
            minimum = torch.where(solvable, (weighted - fit * q) / total, minimum)
            scale = torch.where(solvable, fit, scale)
    return best[1], best[2]


def values_on_grid(weight: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The values of weights, 0 to 15, as floats."""
    return ((weight - minimum) * torch.where(scale == 0, 0, 1 / scale)).round().clamp(0, 15)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-65504, 65504).half().float()


def pack_blocks(values: np.ndarray, scales: np.ndarray, minima: np.ndarray, kind: str) -> np.ndarray:
    """Values (N, B, 32), scales and minima (N, B, 1) as blocks (N, bytes)."""
    fine = np.concatenate((scales, minima), -1)[..., : 1 + (kind == "Q4_1")].astype(np.float16).view(np.uint8)
    whole = values.astype(np.uint8)
    blocks = np.concatenate((fine, whole[..., : BLOCK // 2] | whole[..., BLOCK // 2 :] << 4), -1)
    return blocks.reshape(len(values), -1)


def calibrate(module: Any, ids: Tensor, kind: str) -> None:
    """Round the matrices of a model's layers to blocks, each for its inputs in a text, and give them those blocks.

    All is done in one pass over the text: a matrix is rounded just before it is used, so its inputs have seen the
    rounding of all matrices before it. Matrices whose rows do not fill whole blocks stay as they are.

    Args:
        module: a model of `smolforge.model` in fp32 on the CPU.
        ids: token ids (B, T); rows are texts of their own.
        kind: Q4_0 or Q4_1.

    Raises:
        RunFailed: as `check_finite`.
    """
    check_finite(module)
    parts = (part for part in module.decoder.layers.modules() if isinstance(part, nn.Linear))
    linears = [part for part in parts if part.in_features % BLOCK == 0]
    seen: list[tuple[Tensor, Tensor]] = []  # the inputs of the matrix before, and their factor

    def round_weight(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        if not seen or seen[0][0] is not inputs[0]:
            seen[:] = [(inputs[0], _factor(inputs[0].flatten(0, -2)))]
        blocks, rounded = _round_columns(linear.weight.detach(), seen[0][1], kind)
        linear.weight.data.copy_(rounded)
        linear.weight.blocks = Blocks(kind, blocks, linear.weight._version)  # type: ignore[attr-defined]

    hooks = [linear.register_forward_pre_hook(round_weight) for linear in linears]
    try:
        with torch.no_grad():
            module.decoder(ids)
    finally:
        for hook in hooks:
            hook.remove()


def _factor(inputs: Tensor) -> Tensor:
    """The upper factor U of the inverse of the inputs' second moments, (K, K): inverse = Uᵀ U.

    Args:
        inputs: (tokens, K).
    """
    moments = (inputs.T @ inputs).double()
    diagonal = moments.diagonal()
    diagonal += _DAMPING * diagonal.mean() + 1e-12
    return torch.linalg.cholesky(torch.linalg.inv(moments), upper=True).float()


def _round_columns(weight: Tensor, factor: Tensor, kind: str) -> tuple[np.ndarray, Tensor]:
    """The blocks of weights (N, K), and their numbers."""
    left = weight.T.contiguous()  # (K, N): what is to be rounded, with what earlier columns left over
    rounded, blocks = torch.empty_like(left), []
    for start in range(0, len(left), BLOCK):
        part, corner = left[start : start + BLOCK], factor[start : start + BLOCK, start : start + BLOCK]
        block = quantize_blocks(part.T, kind, corner.diagonal() ** -2)
        scale = torch.from_numpy(block[:, :2].copy().view(np.float16)[:, 0].astype(np.float32))
        minimum = -8 * scale
        if kind == "Q4_1":
            minimum = torch.from_numpy(block[:, 2:4].copy().view(np.float16)[:, 0].astype(np.float32))
        values, errors = torch.empty_like(part), torch.empty_like(part)
        for i in range(BLOCK):
            values[i] = values_on_grid(part[i], scale, minimum)
            rounded[start + i] = values[i] * scale + minimum
            errors[i] = (part[i] - rounded[start + i]) / corner[i, i]
            part[i + 1 :] -= corner[i, i + 1 :, None] * errors[i]
        left[start + BLOCK :] -= factor[start : start + BLOCK, start + BLOCK :].T @ errors
        scales, minima = (x.numpy()[:, None, None] for x in (scale, minimum))
        blocks.append(pack_blocks(values.T[:, None].numpy(), scales, minima, kind))
    return np.concatenate(blocks, 1), rounded.T
