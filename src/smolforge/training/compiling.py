"""torch.compile where it pays, once per run.

Compiled are the block that all layers share, which costs seconds where the whole model would cost a minute and, on a
CPU, runs no slower, the loss of a chunk, and the update of weights in bf16. A machine that cannot compile goes on
without, and says so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from smolforge.model import loss
from smolforge.model.llama import LlamaForCausalLM
from smolforge.training.optim import stochastic_adamw
from smolforge.training.optim.stochastic_adamw import StochasticAdamW


def compile_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Compile in place, for the shapes of training; parameter names stay as they are."""
    # Shapes never change during a run: one graph, and no guard that a varying length could fail.
    for layer in model.model.layers:
        layer.compile(dynamic=False)  # type: ignore[operator]
    loss.compiled_chunk_loss = torch.compile(loss.torch_chunk_loss, dynamic=False)
    if isinstance(optimizer, StochasticAdamW) and optimizer.update is stochastic_adamw.in_pieces:
        optimizer.update = stochastic_adamw.compiled_update()


def graphs() -> int:
    """Graphs that this process has compiled so far."""
    # Importing dynamo takes seconds; where nobody did, nothing was compiled.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def undo(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Back to eager."""
    for module in model.modules():
        module._compiled_call_impl = None
    loss.compiled_chunk_loss = loss.torch_chunk_loss
    if isinstance(optimizer, StochasticAdamW) and optimizer.update is stochastic_adamw.compiled_update():
        optimizer.update = stochastic_adamw.in_pieces


def is_compile_error(error: BaseException) -> bool:
    """Whether an error came from compiling, not from the model."""
    module = type(error).__module__ or ""
    return module.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))


def with_fallback(
    step: Callable[[], None],
    model: LlamaForCausalLM,
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
