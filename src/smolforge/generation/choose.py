"""Which runner for a model on this machine: decided once, in one place, with the reasons in words."""

from __future__ import annotations

from typing import Any

import torch

from smolforge.generation import quantize as precisions
from smolforge.generation.native import NativeRunner
from smolforge.generation.runner import ModuleRunner, Runner
from smolforge.generation.static import StaticRunner
from smolforge.generation.stock import StockRunner
from smolforge.native import NativeUnavailable

_STORED = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def choose_runner(module: Any, quantize: str = "auto", *, threads: int | None = None) -> tuple[Runner, list[str]]:
    """The fastest runner for a module's weights as they are now, and what was decided.

    Args:
        module: a model of `model/registry.py`.
        quantize: fp32, bf16, int8, int4, "auto", or "none" for the precision the weights have.
        threads: of the native step; torch's own number unless given.

    Raises:
        BadInput: there is no such precision.
    """
    weight = next(module.parameters())
    if quantize == "none":
        quantize = _STORED.get(weight.dtype, "bf16")
    parameters = sum(p.numel() for p in module.parameters())
    precision, reason = precisions.choose(quantize, parameters, weight.device.type)
    if module.config.architecture != "llama":
        runner = ModuleRunner(module)
        return runner, [f"runner: {runner.name}; the fast paths are for Llama, not {module.config.architecture}"]
    decisions = [f"precision: {reason}"]
    if weight.device.type != "cpu":
        runner = StaticRunner(module, precision)
        return runner, [*decisions, *runner.decisions, f"runner: {runner.name}"]
    try:
        runner = NativeRunner(module, precision, threads=threads)
    except NativeUnavailable as error:
        runner = StockRunner(module, precision)
        return runner, [*decisions, f"runner: {runner.name}; no native step: {error.message}"]
    return runner, [*decisions, f"runner: {runner.name}"]
