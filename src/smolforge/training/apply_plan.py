"""What the plan sets in this process: threads, precision of products, the allocator; and the first compiled step."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import platform
import sys
import time
from collections.abc import Callable

import torch

from smolforge.errors import OtherProcessFailed, in_one_line
from smolforge.model.architecture import CausalLM
from smolforge.training.plan import Plan

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def apply_plan(plan: Plan) -> None:
    """Report the plan, and set what it decides for the whole process."""
    for reason in plan.reasons:
        logger.info(reason)
    torch.set_num_threads(plan.threads)
    torch.set_float32_matmul_precision(plan.precision.matmul)
    if plan.device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory in this process.

    By default glibc returns large freed blocks to the kernel at once. Training frees and allocates the same blocks
    every step, and each time the kernel maps and zeroes every page again: 20% of a small model's step (docs/log.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # No block is mapped by itself, all come from the heap, and the heap is never trimmed.
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
            mallopt(name, value)


def release_freed_memory() -> None:
    """Give freed memory back to the system: loading, validating and saving take more than a step, at other times."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's


def compiled_graphs() -> int:
    """Number of graphs that this process has compiled."""
    # Importing dynamo takes seconds; where nobody has, nothing was compiled.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def run_first_step(
    step: Callable[[], None], model: CausalLM, optimizer: torch.optim.Optimizer, *, retry: Callable[[], None]
) -> None:
    """Run the first compiled step and report what compiling took.

    Where compiling fails, the step runs without it, after `retry` has made good for a backward pass that has not ended.
    """
    before, began = compiled_graphs(), time.perf_counter()
    try:
        step()
    except Exception as error:
        compiling = type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
        if not compiling and not isinstance(error, OtherProcessFailed):  # of another that cannot compile
            raise
        logger.warning(f"compile: off, it fails on this machine ({in_one_line(error)})")
        for part in (model, optimizer):
            if hasattr(part, "uncompile"):
                part.uncompile()  # type: ignore[union-attr]
        model.zero_grad(set_to_none=True)
        retry()
        step()
        return
    seconds = time.perf_counter() - began
    logger.info(f"compile: {compiled_graphs() - before} graphs, first step after {seconds:.0f} s")
