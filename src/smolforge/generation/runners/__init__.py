"""Runners: what runs the model. Chunks of sequences in, logits out; the engine cannot tell which runner it has.

    module.py   any module, its live weights, on any device: correct by construction, training samples with it
    cpu.py      packed weights and the native step of `smolforge.kernels`
    cuda.py     a static cache, CUDA graphs, and sampling on the GPU
    fused.py    its step of a plain Llama in a few Triton kernels

`select_runner` chooses one and its precision once per engine, and gives the reasons in words.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.devices import half_precision
from smolforge.errors import unknown
from smolforge.generation.kv_cache import KVCache
from smolforge.generation.quantize import check_finite
from smolforge.generation.runners.cpu import PRECISIONS, CpuRunner, Precision
from smolforge.generation.runners.cuda import CudaRunner
from smolforge.generation.runners.module import ModuleRunner
from smolforge.generation.sequence import ScheduledChunk, Sequence
from smolforge.gguf_file import blocks_of
from smolforge.kernels import NativeUnavailable, description

SMALL = 32 << 20  # bytes of fp32 weights that stay in a CPU's cache: fewer bits would save no time
_STORED: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Runner(Protocol):
    """Runs chunks and owns the layout of weights and caches.

    It is `batch_invariant` where a row's logits are bitwise the same whatever else is in the batch, however its prompt
    was cut, and whether a row of the cache was read in a prompt or written.
    """

    name: str  # what runs, for people
    config: ModelConfig
    batch_invariant: bool
    weight_bytes: int  # that this runner holds beyond those of the module it was made from

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        ...

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache."""
        ...

    def forward(self, chunks: Many[ScheduledChunk]) -> Tensor:
        """Run the chunks, extend their caches, and return fp32 CPU logits (sum of chunk.logits, V) in order."""
        ...


@runtime_checkable
class DeviceSampler(Protocol):
    """A runner that can draw the next tokens of many sequences itself, so that no logits leave the device.

    It makes room for as many caches as are used at a time, in a few steps, and for more than `most_caches` one by one.
    """

    most_caches: int

    def default_cache_bytes(self) -> int:
        """Memory for keys and values, unless the user says how much."""
        ...

    def can_sample(self, sequence: Sequence) -> bool:
        """Whether the next token of a sequence can be drawn on the device."""
        ...

    def sample(self, sequences: list[Sequence]) -> list[int]:
        """Run the last token of each sequence and draw the next one; -1 where the logits are NaN."""
        ...


def select_runner(module: Any, quantize: str = "auto", *, threads: int | None = None) -> tuple[Runner, list[str]]:
    """The fastest runner for a module's weights as they are now, and what was decided.

    Args:
        module: a model of `smolforge.model`.
        quantize: fp32, bf16, int8, int4, "auto", or "none" for the precision the weights have; of a GGUF file with
            blocks that the native step runs, both are those blocks.
        threads: of the native step; torch's own number unless given.

    Raises:
        BadInput: there is no such precision.
        RunFailed: it would hide weights that are NaN or infinite.
    """
    weight = next(module.parameters())
    stored = _STORED.get(weight.dtype, "bf16")
    parameters = sum(p.numel() for p in module.parameters())
    blocks = {found.kind for parameter in module.parameters() if (found := blocks_of(parameter))}
    if blocks and quantize in ("auto", "none"):
        precision, reason = "file", f"as in the file ({', '.join(sorted(blocks))}; number for number)"
    else:
        wanted = stored if quantize == "none" else quantize
        precision, reason = _choose_precision(wanted, parameters, weight.device)
    if weight.device.type == "cuda":
        runner = CudaRunner(module, precision)
        return runner, [f"precision: {reason}", f"engine: {runner.name}"]
    if precision in ("int8", "int4", "file"):
        check_finite(module)
    try:
        runner = CpuRunner(module, precision, threads=threads)
    except NativeUnavailable as error:
        runner = ModuleRunner(module)
        return runner, [f"engine: {runner.name}, several times slower than native code: {error.message}"]
    return runner, [f"precision: {reason}", f"kernels: {description()}", f"engine: {runner.name}"]


def _choose_precision(wanted: str, parameters: int, device: torch.device) -> tuple[Precision, str]:
    """The precision of so many weights for `wanted` (one of them or "auto"), and the reason in words."""
    if wanted not in ("auto", *PRECISIONS):
        raise unknown("precision", wanted, ["auto", *PRECISIONS], field="quantize")
    half = "fp16" if half_precision(device) == torch.float16 else "bf16"
    if wanted in ("int8", "int4") and device.type != "cpu":
        return "bf16", f"{half} instead of {wanted}, which only the CPU runner has"
    if wanted == "bf16" != half:
        return "bf16", "fp16 instead of bf16, which this GPU does not multiply"
    if wanted in PRECISIONS:
        return wanted, f"{wanted} (as asked)"
    if device.type != "cpu":
        return "bf16", f"{half} (half the bytes of fp32, at no measurable loss)"
    if 4 * parameters <= SMALL:
        size = 4 * parameters >> 20
        return "fp32", f"fp32 ({size} MiB of weights fit in the CPU cache; quantizing would not be faster)"
    return "int8", "int8 (the bytes of the weights limit decoding; loss within 0.5%, see smolforge eval --quantize)"
