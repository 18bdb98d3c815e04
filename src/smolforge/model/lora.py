"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685): the model's matrices stay, small ones beside them learn.

The names are those of peft: the matrices of an adapter are called `lora_A` and `lora_B`, after the name of the
projection that they change. The base keeps its own names, so its weights are loaded as into any model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolforge.config import LoraConfig, ModelConfig
from smolforge.errors import unknown
from smolforge.model.architecture import CausalLM, build_model

ALL_LINEAR = "all-linear"


class LoraLinear(nn.Linear):
    """x Wᵀ + b + scaling x Aᵀ Bᵀ: W and b are fixed; A, (r, in), and B, (out, r), learn. B begins as zero."""

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias, self.scaling = base.weight, base.bias, config.lora_alpha / config.r
        bound = 1 / math.sqrt(base.in_features)  # peft's own: uniform with the variance of kaiming_uniform(a=sqrt(5))
        first = torch.rand(config.r, base.in_features, generator=generator) * (2 * bound) - bound
        self.lora_A, self.lora_B = _Matrix(first), _Matrix(torch.zeros(base.out_features, config.r))
        for matrix in (self.lora_A, self.lora_B):
            matrix.to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        # The adapter is kept in fp32 and used in the precision of x, as under autocast the base is.
        down = F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scaling
        return F.linear(x, self.weight, self.bias) + F.linear(down, self.lora_B.weight.to(x.dtype))


class _Matrix(nn.Module):
    """A parameter under the name `weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def add_adapter(model: CausalLM, config: LoraConfig, *, seed: int = 0) -> None:
    """Fix the weights of a model and put a new adapter beside its linear layers; equal seeds give equal adapters.

    Raises:
        BadInput: a target is not the name of a linear layer.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(_targets(model, config)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(module, config, generator))


def _targets(model: CausalLM, config: LoraConfig) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that the adapter changes, with their names, in the model's order; never the head."""
    inside = {id(module) for module in model.decoder.modules()}
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
    if config.target_modules == ALL_LINEAR:
        yield from linear.items()
        return
    for target in config.target_modules:
        if not any(_matches(name, target) for name in linear):
            known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise unknown("linear layer", target, [*known, ALL_LINEAR], field="lora.target_modules")
    yield from ((n, m) for n, m in linear.items() if any(_matches(n, target) for target in config.target_modules))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapter_state(model: CausalLM) -> dict[str, Tensor]:
    """The parameters that learn, by name, without copying."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged_state(model: CausalLM, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the model without its adapter whose matrices, in fp32, hold this state of it, on the CPU."""
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        module = name.removesuffix(".weight")
        state[name] = tensor.detach().to("cpu", torch.float32)
        if (first := adapter.get(f"{module}.lora_A.weight")) is not None:
            layer = model.get_submodule(module)
            assert isinstance(layer, LoraLinear)
            state[name] = merge(state[name], first, adapter[f"{module}.lora_B.weight"], layer.scaling)
    return state


def merge(weight: Tensor, first: Tensor, second: Tensor, scaling: float) -> Tensor:
    """W + scaling B A in the precision of W, computed in fp32. weight: (out, in); first: (r, in); second: (out, r)."""
    return torch.addmm(weight.float(), second.float(), first.float(), alpha=scaling).to(weight.dtype)


@functools.lru_cache(maxsize=16)
def _count(model: str, lora: str) -> int:
    built = build_model(ModelConfig.model_validate_json(model), device="meta", seed=None)
    config = LoraConfig.model_validate_json(lora)
    return sum(config.r * (module.in_features + module.out_features) for _, module in _targets(built, config))


def count_adapter_parameters(model: ModelConfig, config: LoraConfig) -> int:
    """How many parameters an adapter has; 0 where the configuration has none."""
    return _count(model.model_dump_json(), config.model_dump_json()) if config.r else 0
