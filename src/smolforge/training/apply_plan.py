"""The plan's choices put into the model."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smolforge.model import attention, loss, native_attention, native_loss
from smolforge.model.llama import LlamaForCausalLM, TiedHead
from smolforge.training import compiling
from smolforge.training.optim import stochastic_adamw
from smolforge.training.optim.stochastic_adamw import StochasticAdamW
from smolforge.training.plan import Plan

ATTENTION = {**attention.WAYS, "native": native_attention.attend}
LOSSES = {**loss.WAYS, "native": native_loss.native_loss}


def apply_plan(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, chosen: Plan) -> None:
    """Use the planned attention, keep or recompute activations, compile or not."""
    model.set_attention(ATTENTION[chosen.attention])
    if isinstance(model.lm_head, TiedHead) and chosen.device.type == "cpu" and not torch.distributed.is_initialized():
        # The table's gradient as embedding is a few rows beside the head's, which is whole: added to it they cost
        # nothing, where a whole one would be made of zeros, filled and added (docs/log.md). DDP wants whole ones.
        model.model.embed_tokens.sparse = True
    if isinstance(optimizer, StochasticAdamW) and chosen.update == "native":
        optimizer.update = stochastic_adamw.native_update
    if chosen.recompute or chosen.compile:
        model.model.run_layer = functools.partial(run_layer, recompute=chosen.recompute)
    if chosen.compile:
        compiling.compile_step(model, optimizer)


def run_layer(layer: nn.Module, *args: object, recompute: bool) -> Tensor:
    """Run a layer; with `recompute` only its inputs are kept (Chen et al. 2016, arXiv:1604.06174)."""
    if not torch.is_grad_enabled():
        # Evaluation and samples come in many shapes, and each would be compiled anew.
        return layer._call_impl(*args)  # type: ignore[return-value]
    if not recompute:
        return layer(*args)
    # A model without dropout draws no random numbers that would have to be drawn again.
    out = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)
    return out
