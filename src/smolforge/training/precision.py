"""Precision in one place: which numbers a run computes in, and why.

fp32        everything in fp32
fp32-high   fp32 storage, matrix products through oneDNN (CPU) or TF32 (CUDA): `set_float32_matmul_precision`
bf16        weights and moments in fp32, matrix products in bf16 by autocast
bf16-pure   weights, gradients and moments in bf16; updates are rounded stochastically, so that small ones count
fp16        as bf16 in fp16, with a gradient scaler: for GPUs without bf16, such as a T4
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from smolforge.errors import BadInput


@dataclass(frozen=True)
class Precision:
    """A decision and its reason.

    Attributes:
        name: one of the keys above.
        weights: precision in which weights are stored and updated.
        autocast: precision of the matrix products, None where it is that of the weights.
        matmul: value for `torch.set_float32_matmul_precision`.
        scaler: whether gradients are scaled against fp16's narrow range.
        reason: why this one, for the log.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None
    matmul: str
    scaler: bool
    reason: str

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """What the forward pass runs in."""
        if self.autocast is None:
            return contextlib.nullcontext()
        # Weights are cast once per micro-batch; caching the casts would only keep stale copies alive.
        return torch.autocast(device.type, self.autocast)


def decide(requested: str, device: torch.device) -> Precision:
    """The precision for a device.

    Raises:
        BadInput: the device cannot do what was asked.
    """
    if requested == "auto":
        name, reason = _best(device)
    else:
        name, reason = requested, "as asked"
    if name == "fp16" and device.type != "cuda":
        raise BadInput(
            "fp16 needs a CUDA device",
            field="training.precision",
            hint="Use auto: bf16 where the processor has it, fp32 else.",
        )
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    table = {
        "fp32": Precision("fp32", fp32, None, "highest", False, reason),
        "fp32-high": Precision("fp32-high", fp32, None, _fast_fp32(device), False, reason),
        # fp32 attention inside bf16 runs goes the fast way too.
        "bf16": Precision("bf16", fp32, bf16, _fast_fp32(device), False, reason),
        "bf16-pure": Precision("bf16-pure", bf16, None, _fast_fp32(device), False, reason),
        "fp16": Precision("fp16", fp32, fp16, "high", True, reason),
    }
    return table[name]


def _best(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} has bf16"
        return "fp16", f"{name} has no bf16; gradients are scaled"
    if device.type == "cpu":
        flags = cpu_flags()
        if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
            return "bf16", "this processor multiplies bf16"
        return "fp32-high", "this processor has no bf16 arithmetic"
    return "fp32", f"bf16 is not known to pay on {device.type}"


def _fast_fp32(device: torch.device) -> str:
    # On a CPU "medium" leaves MKL for oneDNN: 2.3 times faster on AMD at unchanged fp32 accuracy. Where the
    # processor multiplies bf16 natively with AMX, oneDNN would round the inputs, so there it stays exact.
    if device.type == "cpu":
        return "highest" if "amx_bf16" in cpu_flags() else "medium"
    return "high"


def cpu_flags() -> set[str]:
    """What the processor says it can do; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
