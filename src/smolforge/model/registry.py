"""The architectures by name. Adding one is a module beside this and a line in `_BUILDERS`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from smolforge.config import ModelConfig
from smolforge.errors import unknown
from smolforge.model.init import initialise
from smolforge.model.llama import LlamaForCausalLM
from smolforge.model.recreation import SmollmV2Recreation

_BUILDERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "llama": LlamaForCausalLM,
    "recreation": SmollmV2Recreation,
}


def build(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int | None = 0,
) -> LlamaForCausalLM:
    """The model of `config`, with new weights of `seed`, or with memory not yet filled where `seed` is None.

    `device="meta"` with `seed=None` takes no memory: for counting, and for weights that are assigned afterwards.
    """
    if config.architecture not in _BUILDERS:
        raise unknown("architecture", config.architecture, _BUILDERS, field="model.architecture")
    with torch.device("meta"):
        model = _BUILDERS[config.architecture](config)
    model = model.to(dtype)
    if str(device) != "meta":
        model = model.to_empty(device=device)
    if seed is not None:
        initialise(model, std=config.init_std, layers=config.num_hidden_layers, seed=seed)
    return model  # type: ignore[return-value]
