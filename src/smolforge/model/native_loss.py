"""The loss of a chunk of tokens on a CPU, from loss.cpp: the logits cross the memory's bus twice, not six times.

What it is not made for (fp16, fp64, other devices) goes to torch.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from smolforge import kernels
from smolforge.model import loss


def unavailable() -> str | None:
    """Why there is no native loss on this machine, in words; None where there is."""
    return kernels.unavailable()


def chunk_loss(logits: Tensor, targets: Tensor, scale: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """As of `loss.torch_chunk_loss`: the loss of one chunk, its gradient in the place of the logits (n, V).

    Raises:
        IndexError: a target is no column of the logits.
    """
    kinds = (torch.float32, torch.bfloat16)
    if logits.device.type != "cpu" or logits.dtype not in kinds or not logits.is_contiguous():
        return loss.torch_chunk_loss(logits, targets, scale, z_weight)
    targets = targets.to(torch.int64).contiguous()
    count, words = logits.shape
    if count and not bool(((targets == loss.IGNORE) | ((targets >= 0) & (targets < words))).all()):
        raise IndexError(f"a target is none of {words:,} columns")
    cross_entropy, z_loss = torch.empty(2, count, dtype=torch.float64)
    kernels.library().smolforge_loss(
        ctypes.c_int64(count), ctypes.c_int64(words), ctypes.c_void_p(logits.data_ptr()),
        int(logits.dtype == torch.bfloat16), ctypes.c_void_p(targets.data_ptr()), ctypes.c_int64(loss.IGNORE),
        ctypes.c_float(float(scale)), ctypes.c_float(z_weight), ctypes.c_void_p(cross_entropy.data_ptr()),
        ctypes.c_void_p(z_loss.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return cross_entropy.sum().float(), z_loss.sum().float()


native_loss = functools.partial(loss.chunked_loss, chunk_loss=chunk_loss)
