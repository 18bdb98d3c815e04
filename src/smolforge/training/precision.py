"""The numbers that a run computes in.

fp32        everything in fp32
fp32-high   fp32 storage, matrix products through oneDNN (CPU) or TF32 (CUDA): `set_float32_matmul_precision`
bf16        weights and moments in fp32, matrix products in bf16 by autocast
bf16-pure   weights, gradients and moments in bf16, updates rounded stochastically so that small ones count
fp16        as bf16 in fp16, with a gradient scaler: for GPUs without bf16, such as a T4
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from smolforge.devices import Gpu, gpu_of
from smolforge.errors import BadInput
from smolforge.kernels.variants import cpu_flags


@dataclass(frozen=True)
class Precision:
    """The numbers that a run computes in."""

    name: str  # one of those above
    weights: torch.dtype  # in which weights are stored and updated
    autocast: torch.dtype | None  # of the matrix products, None where it is that of the weights
    matmul: str  # for `torch.set_float32_matmul_precision`
    scaler: bool = False  # whether gradients are scaled against fp16's narrow range

    @property
    def products(self) -> torch.dtype:
        """Of the inputs of matrix products."""
        return self.autocast or self.weights

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context of forward passes."""
        return torch.autocast(device.type, self.autocast) if self.autocast else contextlib.nullcontext()


def choose_precision(asked: str, device: torch.device, gpu: Gpu | None = None) -> tuple[Precision, str]:
    """The precision for a device, and the reason; BadInput where the device cannot do what was asked."""
    name, reason = _best_precision(device, gpu or gpu_of(device)) if asked == "auto" else (asked, "as asked")
    if name == "fp16" and device.type != "cuda":
        hint = "Use auto: bf16 where the processor has it, fp32 elsewhere."
        raise BadInput("fp16 needs a CUDA device", field="training.precision", hint=hint)
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    # On a CPU "medium" means oneDNN instead of MKL: 2.3 times faster on AMD at unchanged fp32 accuracy. Where the
    # processor multiplies bf16 with AMX, oneDNN would round the inputs, so there it stays exact. fp32 attention inside
    # of bf16 runs uses it too.
    fast = "high" if device.type != "cpu" else "highest" if "amx_bf16" in cpu_flags() else "medium"
    precision = {
        "fp32": Precision("fp32", fp32, None, "highest"),
        "fp32-high": Precision("fp32-high", fp32, None, fast),
        "bf16": Precision("bf16", fp32, bf16, fast),
        "bf16-pure": Precision("bf16-pure", bf16, None, fast),
        "fp16": Precision("fp16", fp32, fp16, "high", scaler=True),
    }[name]
    return precision, reason


def _best_precision(device: torch.device, gpu: Gpu | None) -> tuple[str, str]:
    if gpu:
        if gpu.has_bf16:
            return "bf16", f"{gpu.name} has bf16"
        return "fp16", f"{gpu.name} has no bf16; gradients are scaled"
    if device.type == "cpu":
        if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
            return "bf16", "this processor multiplies bf16"
        return "fp32-high", "this processor has no bf16 arithmetic"
    return "fp32", f"not known whether bf16 is faster on {device.type}"
