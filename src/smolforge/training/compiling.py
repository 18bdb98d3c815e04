"""torch.compile where it pays, once per run.

Compiled are the block that all layers share and the loss of a chunk (`CausalLM.compile_training`), and the update of
weights in bf16. A machine that cannot compile trains without, and says so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from smolforge.model.architecture import CausalLM
from smolforge.training.optim import stochastic_adamw
from smolforge.training.optim.stochastic_adamw import StochasticAdamW


def compile_update(optimizer: torch.optim.Optimizer) -> None:
    """Compile the update of weights in bf16, in place."""
    if isinstance(optimizer, StochasticAdamW) and optimizer.update is stochastic_adamw.in_pieces:
        optimizer.update = stochastic_adamw.compiled_update()


def graphs() -> int:
    """Graphs that this process has compiled so far."""
    # Importing dynamo takes seconds; where nobody did, nothing was compiled.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def undo(model: CausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Back to eager."""
    model.uncompile()
    if isinstance(optimizer, StochasticAdamW) and optimizer.update is stochastic_adamw.compiled_update():
        optimizer.update = stochastic_adamw.in_pieces


def is_compile_error(error: BaseException) -> bool:
    """Whether an error came from compiling, not from the model."""
    module = type(error).__module__ or ""
    return module.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))


def with_fallback(
    step: Callable[[], None],
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
) -> None:
    """Run the first step, and say what compiling took; where it fails, say so and run the step eagerly."""
    before, began = graphs(), time.perf_counter()
    try:
        step()
        say(f"compile: {graphs() - before} graphs, first step after {time.perf_counter() - began:.0f} s")
    except Exception as error:
        if not is_compile_error(error):
            raise
        first = str(error).strip().splitlines()[0][:200]
        say(f"compile: off, this machine cannot ({type(error).__name__}: {first})")
        undo(model, optimizer)
        model.zero_grad(set_to_none=True)
        step()
