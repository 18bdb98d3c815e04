"""Apply the plan to this process: threads, matrix products, freed memory, and torch.compile with its fallback.

Everything else of the plan goes to the constructors of model and optimizer.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from smolforge.model.architecture import CausalLM
from smolforge.training.plan import Plan

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Of glibc's malloc.h: no block is mapped by itself, all come from the heap, and the heap is never trimmed.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MALLOC_SETTINGS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}


def apply_plan(plan: Plan) -> None:
    """Set what the plan decides for the whole process."""
    torch.set_num_threads(plan.threads)
    torch.set_float32_matmul_precision(plan.precision.matmul)
    if plan.device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory in this process; False where the C library is another one.

    By default glibc returns large freed blocks to the kernel at once. Training frees and allocates the same blocks
    every step, and each time the kernel maps and zeroes every page again: 20% of a small model's step (docs/log.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in _MALLOC_SETTINGS.items())


def compiled_graphs() -> int:
    """Number of graphs that this process has compiled."""
    # Importing dynamo takes seconds; where nobody has, nothing was compiled.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def run_first_step(step: Callable[[], T], model: CausalLM, optimizer: torch.optim.Optimizer) -> T:
    """Run the first compiled step and report what compiling took; where compiling fails, run the step without it."""
    before, began = compiled_graphs(), time.perf_counter()
    try:
        result = step()
    except Exception as error:
        if not _is_compile_error(error):
            raise
        first = str(error).strip().splitlines()[0][:200]
        logger.warning(f"compile: off, it fails on this machine ({type(error).__name__}: {first})")
        for part in (model, optimizer):
            if hasattr(part, "uncompile"):
                part.uncompile()  # type: ignore[union-attr]
        model.zero_grad(set_to_none=True)
        return step()
    seconds = time.perf_counter() - began
    logger.info(f"compile: {compiled_graphs() - before} graphs, first step after {seconds:.0f} s")
    return result


def _is_compile_error(error: BaseException) -> bool:
    module = type(error).__module__ or ""
    return module.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
