"""Optimizers, the update of the weights, and the learning rate as a function of the step.

In the order to read them, after this file (the registry, parameter groups, `optimizer_step`, learning-rate schedules):

    adamw.py   adamw and adamw8bit; weights in bf16 are rounded stochastically
    muon.py    muon

Adding an optimizer is one new file here: a function under `@register("name")` that returns a `torch.optim.Optimizer`
over all parameters of the model, as `OptimizerBuilder` says. `optimizer.name` then takes that name.

An optimizer may set `_step_supports_amp_scaling = True`, as torch's fused ones do. It then skips an update on the
device where its attribute `found_inf` is not 0; other optimizers cost a synchronization with the host each step.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from smolforge.config import OptimizerConfig, ScheduleConfig
from smolforge.distributed import DistributedContext, is_sharded
from smolforge.errors import unknown

# (model on its device, section `optimizer` of the configuration, *, update, products) -> optimizer. `update` is the
# code that updates weights in bf16 ("torch", "compiled" or "native") and `products` the precision of the model's
# matrix products; an optimizer may ignore them.
OptimizerBuilder = Callable[..., torch.optim.Optimizer]
_BUILDERS: dict[str, OptimizerBuilder] = {}


def register(name: str) -> Callable[[OptimizerBuilder], OptimizerBuilder]:
    """Register the decorated function as the builder of `optimizer.name = name`."""

    def add(builder: OptimizerBuilder) -> OptimizerBuilder:
        _BUILDERS[name] = builder
        return builder

    return add


@functools.cache
def builders() -> dict[str, OptimizerBuilder]:
    """All registered optimizers by name; imports the files of this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _BUILDERS


def check_optimizer(name: str) -> None:
    """Raise BadInput with the closest name unless an optimizer of this name is registered."""
    if name not in builders():
        raise unknown("optimizer", name, sorted(builders()), field="optimizer.name")


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, update: str = "torch", products: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer of `config` over the parameters of `model` that learn; arguments as of `OptimizerBuilder`."""
    check_optimizer(config.name)
    return builders()[config.name](model, config, update=update, products=products)


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, orthogonal: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Parameters by learning-rate factor and weight decay, in the model's order; each is in exactly one group.

    Matrices and embeddings are decayed, vectors are not. The first pattern of `config.groups` found in a name
    overrides that: `lr` there is a factor, `weight_decay` a value.

    Args:
        orthogonal: names of parameters in groups of their own, marked `orthogonal`.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # beside an adapter
            continue
        chosen = next((values for pattern, values in config.groups.items() if re.search(pattern, name)), {})
        decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        key = (float(chosen.get("lr", 1.0)), float(chosen.get("weight_decay", decay)), name in orthogonal)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "factor": lr, "weight_decay": decay, "orthogonal": marked}
        for (lr, decay, marked), members in groups.items()
    ]


def skipped(found_inf: Tensor | None, device: torch.device) -> Tensor:
    """Whether an optimizer's `found_inf` says to skip the next update: () on `device`."""
    return (torch.zeros((), device=device) if found_inf is None else found_inf.to(device)) != 0


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next update; each group scales it by its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, nats: Tensor, *,
    lr: float, clip: float, ranks: DistributedContext, scaler: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Clip the gradients, and update the weights unless something is not finite.

    The fused optimizers skip an update on the device (`found_inf`), so the host does not wait for it.

    Args:
        nats: () sum of this rank's losses; becomes the sum over all ranks in place.
        clip: largest global norm of the gradient, 0 for none.
        scaler: gradient scaler of fp16 runs.

    Returns:
        Norm of the gradient before clipping (), and whether the update was skipped ().
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    ranks.sum_(nats)
    set_learning_rate(optimizer, lr)
    if scaler:
        scaler.unscale_(optimizer)
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    if is_sharded(norm):
        norm = norm.full_tensor()
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    finite = torch.isfinite(nats)
    if scaler:
        # The scaler skips gradients that overflow, which is normal while it looks for its scale; not at a scale of 1.
        finite = finite & (torch.isfinite(norm) | (scaler._get_scale_async() > 1))
        scaler.step(optimizer)
        scaler.update()
    else:
        finite = finite & torch.isfinite(norm)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif bool(finite):
            optimizer.step()
    return norm, ~finite


# Schedules. Nothing is kept between calls: a resumed run needs only its step.


def schedule_factor(config: ScheduleConfig, step: int, total: int) -> float:
    """Factor of the peak learning rate, in [0, 1], for update number `step` (0-based) of a run of `total` updates."""
    return _SCHEDULES[config.name](config, step, total)


def steps_of(value: float, total: int) -> int:
    """A length given in steps, or as a share of the run where below 1."""
    return round(value * total) if value < 1 else min(int(value), total)


def _warmup(config: ScheduleConfig, step: int, total: int) -> float:
    """The warmup, then constant. The first update already moves: its factor is 1 / (warmup + 1)."""
    return min(1.0, (step + 1) / (steps_of(config.warmup, total) + 1))


def _wsd(config: ScheduleConfig, step: int, total: int) -> float:
    """Warmup, stable, linear decay (Hu et al. 2024, arXiv:2404.06395; SmolLM2's own)."""
    decay = steps_of(config.decay, total)
    left = total - step
    falling = 1.0 if left > decay else config.floor + (1 - config.floor) * left / (decay + 1)
    return min(_warmup(config, step, total), falling)


def _cosine(config: ScheduleConfig, step: int, total: int) -> float:
    """Warmup, then half a cosine to the floor (Loshchilov & Hutter 2016, arXiv:1608.03983)."""
    warmup = steps_of(config.warmup, total)
    if step < warmup:
        return _warmup(config, step, total)
    return _anneal("cosine", 1.0, config.floor, min(1.0, (step - warmup) / max(1, total - warmup)))


def _onecycle(config: ScheduleConfig, step: int, total: int) -> float:
    """Up from `start`, down to `floor` times the start, as torch's OneCycleLR (Smith 2017, arXiv:1708.07120)."""
    peak_at = max(1.0, steps_of(config.warmup, total) - 1.0)
    last = max(peak_at + 1, total - 1.0)
    if step <= peak_at:
        return _anneal(config.anneal, config.start, 1.0, step / peak_at)
    end = config.start * config.floor
    return _anneal(config.anneal, 1.0, end, min(1.0, (step - peak_at) / (last - peak_at)))


def _anneal(shape: str, first: float, last: float, share: float) -> float:
    if shape == "linear":
        return first + (last - first) * share
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


_SCHEDULES = {"wsd": _wsd, "cosine": _cosine, "onecycle": _onecycle, "constant": _warmup}
