"""The architectures by name. Adding one is a module beside this and a line in `_BUILDERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from smolforge.config import ModelConfig
from smolforge.errors import unknown
from smolforge.model.init import initialise
from smolforge.model.llama import LlamaForCausalLM
from smolforge.model.recreation import SmollmV2Recreation

_BUILDERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "llama": LlamaForCausalLM,
    "recreation": SmollmV2Recreation,
}


class _Bare(TorchFunctionMode):
    """Modules without their usual first weights, which come from `initialise` or a file.

    Drawing numbers that are never seen costs more than time: on the meta device it imports all of torch.compile, two
    seconds at the start of every command.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


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
    with torch.device("meta"), _Bare():
        model = _BUILDERS[config.architecture](config)
    model = model.to(dtype)
    if str(device) != "meta":
        model = model.to_empty(device=device)
    if seed is not None:
        initialise(model, std=config.init_std, layers=config.num_hidden_layers, seed=seed)
    return model  # type: ignore[return-value]
