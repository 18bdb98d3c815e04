"""AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101): torch's, with moments in 8 bits, or for weights in bf16.

bf16 keeps 8 bits: an update below 1/256 of a weight is lost when rounded to nearest, and late in a run nearly all are.
Rounded up or down at random, with the odds of where it lies between, every update counts on average (Gupta et al.
2015, arXiv:1502.02551). The second moment changes by 1 - beta2 of itself and needs the same; the first changes enough.

The random bits are a hash of (seed, step, parameter, element), so an update is a pure function of the saved state and
a resumed run continues bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smolforge import kernels
from smolforge.config import OptimizerConfig
from smolforge.distributed import local_rows
from smolforge.errors import BadInput
from smolforge.training.optim import parameter_groups, register, skipped

# Odd multipliers of the hash and the shifts between them: "lowbias32" of Hash Prospector (Wellons 2018), as signed
# 32-bit numbers, for torch has no unsigned shifts.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_PIECE = 1 << 16  # elements
_STRIDE = 0x9E3779B9 - (1 << 32)  # 2**32 / golden ratio, spreads steps and parameters


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift of int32; torch's own carries the sign along."""
    return (bits >> count) & ((1 << (32 - count)) - 1)


def random_bits(key: Tensor, count: int) -> Tensor:
    """`count` int32 random numbers that depend on `key` (int32, 1 element) and their place only."""
    return _scramble(torch.arange(count, dtype=torch.int32, device=key.device) + key)


def _scramble(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 16)) * _FIRST
    bits = (bits ^ _shift_right(bits, 15)) * _SECOND
    return bits ^ _shift_right(bits, 16)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 → bf16, up with the probability of the part that is cut off.

    Args:
        values: fp32.
        bits: int32 of the same shape, of which the low 16 bits are used.
    """
    # bf16 is the upper half of an fp32: adding 16 random bits to the lower half carries with just those odds.
    # An infinity has no lower bits and stays; a NaN may become another NaN.
    kept = (values.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    return kept.view(torch.float32).to(torch.bfloat16)


def update_at_once(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, key: Tensor, skip: Tensor, rates: Tensor,
    beta1: float, beta2: float,
) -> None:  # fmt: skip
    """One AdamW update of a flat parameter, in place; fp32 inside. `rates` are those of `_rates`."""
    g = gradient.float()
    m = beta1 * first.float() + (1 - beta1) * g
    v = beta2 * second.float() + (1 - beta2) * g * g
    w = weight.float() * rates[0] - rates[1] * m / (v.sqrt() * rates[2] + rates[3])
    bits = random_bits(key, weight.numel())
    weight.copy_(torch.where(skip, weight, round_stochastically(w, bits)))
    first.copy_(torch.where(skip, first, m.to(torch.bfloat16)))
    second.copy_(torch.where(skip, second, round_stochastically(v, _shift_right(bits, 16))))


def update_in_pieces(*args: Any) -> None:
    """`update_at_once` without a compiler: on a CPU piece by piece, so that the intermediates stay in the cache."""
    *tensors, key, skip, rates, beta1, beta2 = args
    size = tensors[0].numel()
    length = _PIECE if tensors[0].device.type == "cpu" else max(size, 1)  # elsewhere each piece would start 30 kernels
    for start in range(0, size, length):
        w, g, m, v = (t[start : start + length] for t in tensors)
        update_at_once(w, g, m, v, key + start, skip, rates, beta1, beta2)


def native_update(*args: Any) -> None:
    """`update_at_once` on a CPU, from adamw.cpp: one pass over the memory."""
    *tensors, key, skip, rates, beta1, beta2 = args
    if any(type(t) is not Tensor or t.device.type != "cpu" or t.dtype != torch.bfloat16 for t in tensors):
        update_in_pieces(*args)
    elif not skip:
        kernels.library().smolforge_rounded_adamw(
            ctypes.c_int64(tensors[0].numel()), *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
            ctypes.c_uint32(int(key) & 0xFFFFFFFF), ctypes.c_void_p(rates.data_ptr()), ctypes.c_float(beta1),
            ctypes.c_float(beta2), torch.get_num_threads(),
        )  # fmt: skip


@functools.cache
def _compiled() -> Callable[..., None]:
    return torch.compile(update_at_once, dynamic=True)  # for flat parameters of any size


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) over bf16 parameters.

    Args:
        params: parameter groups of `parameter_groups`.
        seed: of the random bits.
        update: which code updates a parameter: "torch", "compiled", or "native" for C++ on a CPU.

    Attributes:
        found_inf: (), not 0 where the next update is to be skipped; None for never.
    """

    _step_supports_amp_scaling = True  # torch's name for an optimizer that reads `found_inf`

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        seed: int = 0,
        update: str = "torch",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self.found_inf: Tensor | None = None
        self._update = {"native": native_update, "torch": update_in_pieces}.get(update) or _compiled()

    def uncompile(self) -> None:
        """Update without torch.compile, where the machine cannot compile."""
        if self._update is not native_update:
            self._update = update_in_pieces

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "gradients are computed before"
        number = 0
        skips: dict[torch.device, Tensor] = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                state, device = self.state[parameter], parameter.device
                if not state:
                    state["step"] = torch.zeros((), device=device)
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                if device not in skips:
                    skips[device] = skipped(self.found_inf, device)
                skip = skips[device]
                state["step"] += (~skip).float()
                weight, first = local_rows(parameter)
                gradient, mean, square = (
                    local_rows(each)[0] for each in (parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                )
                # The bits of an element do not depend on the rank that has it.
                key = _key(self.seed, number, state["step"]) + first * parameter.shape[1:].numel()
                self._update(
                    weight.view(-1), gradient.contiguous().view(-1), mean.view(-1), square.view(-1),
                    key, skip, _rates(group, state["step"]), beta1, beta2,
                )  # fmt: skip
        return None


def _rates(group: dict[str, Any], step: Tensor) -> Tensor:
    """Factor of the weight, of m, of sqrt(v), and epsilon: the bias corrections are in them, fp32 (4,)."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    size = lr / (1 - torch.pow(beta1, step))
    root = (1 - torch.pow(beta2, step)).rsqrt()
    return torch.stack([torch.full_like(size, 1 - lr * group["weight_decay"]), size, root,
                        torch.full_like(size, group["eps"])])  # fmt: skip


def _key(seed: int, number: int, step: Tensor) -> Tensor:
    """The starting point of a parameter's random bits at a step, int32 (1,), scrambled."""
    start = (seed * 0x85EBCA6B + number * 0xC2B2AE35) & 0xFFFFFFFF
    start = start - (1 << 32) if start >= 1 << 31 else start
    return _scramble(step.to(torch.int32).reshape(1) * _STRIDE + start)


@register("adamw")
def build_adamw(model: nn.Module, config: OptimizerConfig, *, update: str, **_: Any) -> torch.optim.Optimizer:
    """torch's fused AdamW, where one kernel updates all parameters; weights in bf16 are rounded stochastically."""
    groups = parameter_groups(model, config)
    if any(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad):
        return StochasticAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, update=update)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@register("adamw8bit")
def build_adamw8bit(model: nn.Module, config: OptimizerConfig, **_: Any) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861), from bitsandbytes."""
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError:
        raise BadInput(
            "adamw8bit needs the bitsandbytes library",
            field="optimizer.name",
            hint="pip install bitsandbytes, or use adamw.",
        ) from None
    if next(model.parameters()).device.type != "cuda":
        raise BadInput("adamw8bit needs a CUDA device", field="optimizer.name", hint="Use adamw.")
    groups = parameter_groups(model, config)
    return bitsandbytes.optim.AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
