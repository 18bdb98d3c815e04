"""torch.compile where it pays, once per run.

On a CPU the block that all layers share is compiled, which costs seconds where the whole model would cost a minute
and runs no slower; on a GPU the whole model is one graph. A machine that cannot compile goes on without, and says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from smolforge.model import loss
from smolforge.model.llama import LlamaForCausalLM


def compile_model(model: LlamaForCausalLM, device: torch.device) -> None:
    """Compile in place; parameter names stay as they are."""
    # Shapes never change during a run: one graph, and no guard that a varying length could fail.
    if device.type == "cuda":
        model.model.compile(dynamic=False, fullgraph=True)
    else:
        for layer in model.model.layers:
            layer.compile(dynamic=False)  # type: ignore[operator]
    loss.chunk_loss = torch.compile(loss._chunk_loss, dynamic=False)


def undo(model: LlamaForCausalLM) -> None:
    """Back to eager."""
    for module in model.modules():
        module._compiled_call_impl = None
    loss.chunk_loss = loss._chunk_loss


def is_compile_error(error: BaseException) -> bool:
    """Whether an error came from compiling, not from the model."""
    module = type(error).__module__ or ""
    return module.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))


def with_fallback(step: Callable[[], None], model: LlamaForCausalLM, say: Callable[[str], None]) -> None:
    """Run the first step; where compiling fails, say so and run it eagerly."""
    try:
        step()
    except Exception as error:
        if not is_compile_error(error):
            raise
        first = str(error).strip().splitlines()[0][:200]
        say(f"compile: off, this machine cannot ({type(error).__name__}: {first})")
        undo(model)
        model.zero_grad(set_to_none=True)
        step()
