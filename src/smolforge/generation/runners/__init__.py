"""Which runner for a model on this machine, and whether a draft runs beside it: decided once, with reasons in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.generation import quantize as precisions
from smolforge.generation.kv_cache import Cache
from smolforge.generation.runners.cpu import CpuRunner
from smolforge.generation.runners.module import ModuleRunner
from smolforge.generation.sequence import ScheduledChunk
from smolforge.generation.static import StaticRunner
from smolforge.generation.stock import StockRunner
from smolforge.kernels import NativeUnavailable, description
from smolforge.model.architecture import architecture_of

_STORED = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Runner(Protocol):
    """Runs chunks and owns the layout of weights and caches.

    Attributes:
        name: what runs, in words, for people.
        config: the shape of the model.
        batch_invariant: a row's logits are bitwise the same whatever else is in the batch, however its prompt
            was cut, and whether a row of the cache was read in a prompt or written.
        weight_bytes: bytes of the weights that this runner holds beyond those of the module it was made from.
    """

    name: str
    config: ModelConfig
    batch_invariant: bool
    weight_bytes: int

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        ...

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache."""
        ...

    def forward(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Run the chunks, extend their caches, and return fp32 CPU logits (sum of chunk.logits, V) in order."""
        ...


def select_runner(module: Any, quantize: str = "auto", *, threads: int | None = None) -> tuple[Runner, list[str]]:
    """The fastest runner for a module's weights as they are now, and what was decided.

    Args:
        module: a model of `model/`.
        quantize: fp32, bf16, int8, int4, "auto", or "none" for the precision the weights have.
        threads: of the native step; torch's own number unless given.

    Raises:
        BadInput: there is no such precision.
        RunFailed: it would hide weights that are no numbers.
    """
    weight = next(module.parameters())
    if quantize == "none":
        quantize = _STORED.get(weight.dtype, "bf16")
    parameters = sum(p.numel() for p in module.parameters())
    precision, reason = precisions.choose(quantize, parameters, weight.device.type)
    if not architecture_of(module.config).fast_decoding:
        runner = ModuleRunner(module)
        why = f"the fast paths and their precisions are for Llama, not {module.config.architecture}"
        return runner, [f"runner: {runner.name} in {_STORED.get(weight.dtype, weight.dtype)}; {why}"]
    if precision in ("int8", "int4"):
        precisions.check_finite(module)
    decisions = [f"precision: {reason}"]
    if weight.device.type != "cpu":
        runner = StaticRunner(module, precision)
        return runner, [*decisions, *runner.decisions, f"runner: {runner.name}"]
    try:
        runner = CpuRunner(module, precision, threads=threads)
    except NativeUnavailable as error:
        runner = StockRunner(module, precision)
        return runner, [*decisions, f"runner: {runner.name}; no native step: {error.message}"]
    return runner, [*decisions, f"kernels: {description()}", f"runner: {runner.name}"]
