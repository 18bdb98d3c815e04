"""What is decided before the first step, each decision once and with its reason.

A plan depends on the configuration and the machine's shape only, never on a measurement: the same machine decides the
same again, so a resumed run computes exactly what the uninterrupted one would have.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from smolforge import kernels
from smolforge.config import RunConfig
from smolforge.errors import BadInput
from smolforge.model import native_attention, native_loss
from smolforge.model.summary import flops_per_token
from smolforge.training import memory
from smolforge.training.precision import Precision, decide

# Tokens of one micro-batch on a CPU: enough rows to fill the matrix products, few enough to stay in memory.
CPU_MICRO_TOKENS = 4096
# Global batches where the configuration leaves them open: what one GPU accumulates in seconds, a laptop in minutes.
GPU_STEP_TOKENS = 1 << 19
CPU_STEP_TOKENS = 1 << 13
# Up to this length blocked attention is taken for bf16 on a CPU; it lies between the two lengths that were measured.
SHORT = 1024
# What compiling costs and gains, from docs/performance.md: it must earn itself back well within the run.
COMPILE_SECONDS = {"cpu": 40.0, "cuda": 90.0}
COMPILE_GAIN = 1.25
ASSUMED_FLOPS = {"cpu": 2e11, "cuda": 2e14}


@dataclass(frozen=True)
class Plan:
    """Decisions of one run on one machine.

    Attributes:
        sequences: sequences of the global batch that this rank computes in a step.
        micro_batch: sequences of one forward pass; divides `sequences`.
        attention: a key of `model.attention.ATTENTION`.
        loss: a key of `model.loss.LOSSES`.
        update: "native" or "torch": what updates weights that are rounded stochastically.
        recompute: whether the backward pass computes each layer's activations again instead of keeping them.
        reasons: one line per decision, to be printed and kept in the report.
    """

    device: torch.device
    precision: Precision
    sequences: int
    micro_batch: int
    compile: bool
    threads: int
    attention: str = "sdpa"
    loss: str = "chunked"
    update: str = "torch"
    recompute: bool = False
    reasons: list[str] = field(default_factory=list)

    @property
    def model_options(self) -> dict[str, Any]:
        """The arguments of `build_model` that were decided here."""
        # DDP needs gradients of every row.
        sparse = self.device.type == "cpu" and not torch.distributed.is_initialized()
        return {
            "attention": self.attention, "loss": self.loss, "recompute": self.recompute, "compile": self.compile,
            "sparse_embedding": sparse,
        }  # fmt: skip


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU. `SMOLFORGE_DEVICE` overrides."""
    asked = os.environ.get("SMOLFORGE_DEVICE")
    if asked:
        return torch.device(asked)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def resolve_batch(config: RunConfig, device: torch.device) -> RunConfig:
    """Fill in the global batch where the configuration leaves it open; it is part of the run from then on."""
    if config.training.tokens_per_step is not None:
        return config
    wanted = GPU_STEP_TOKENS if device.type == "cuda" else CPU_STEP_TOKENS
    sequences = max(1, wanted // config.data.sequence_length)
    training = config.training.model_copy(update={"tokens_per_step": sequences * config.data.sequence_length})
    return config.model_copy(update={"training": training})


def make_plan(config: RunConfig, device: torch.device, world: int) -> Plan:
    """Decide everything that the configuration leaves to the machine.

    Raises:
        BadInput: the batch cannot be shared out over the ranks, or the device cannot do what was asked.
    """
    total = config.sequences_per_step
    for name, count in (("data.lanes", config.data.lanes), ("sequences per step", total)):
        if count % world:
            raise BadInput(
                f"{count} cannot be shared evenly by {world} ranks",
                field=name,
                hint=f"Make it a multiple of {world}, or start another number of ranks.",
            )
    reasons = [f"device: {_device_name(device)}" + (f", {world} ranks" if world > 1 else "")]
    precision = decide(config.training.precision, device)
    reasons.append(f"precision: {precision.name} ({precision.reason})")
    sequences = total // world
    micro, recompute, room = _share_of_memory(config, device, precision, sequences)
    reasons.append(
        f"batch: {config.tokens_per_step:,} tokens per step = {total} sequences of {config.data.sequence_length:,}"
        f" = {world} ranks x {sequences // micro} micro-batches x {micro}"
    )
    if room:
        reasons.append(f"memory: {room}")
    attention, reason = _attention(config, device, precision)
    reasons.append(f"attention: {attention} ({reason})")
    loss, reason = _loss(config, device)
    reasons.append(f"loss: {loss} ({reason})")
    update = "torch"
    if precision.weights == torch.bfloat16 and config.optimizer.name == "adamw":
        update, reason = _update(device)
        reasons.append(f"update: {update} ({reason})")
    if "native" in (attention, loss, update):
        reasons.append(f"kernels: {kernels.description()}")
    compiled, reason = _compile(config, device, world)
    reasons.append(f"compile: {'on' if compiled else 'off'} ({reason})")
    threads = config.training.threads or _physical_cores(world)
    if device.type == "cpu":
        reasons.append(f"threads: {threads}")
    return Plan(device, precision, sequences, micro, compiled, threads, attention, loss, update, recompute, reasons)


def _share_of_memory(
    config: RunConfig, device: torch.device, precision: Precision, sequences: int
) -> tuple[int, bool, str]:
    """Micro-batch, whether to recompute activations, and the reason where `training.memory` decided."""
    budget, asked = config.training.memory, config.training.micro_batch
    if budget == "auto":
        return _micro_batch(config, device, sequences), False, ""
    if asked != "auto":
        _micro_batch(config, device, sequences)  # refuses what does not divide
        choices = [asked]
    else:
        choices = [d for d in range(sequences, 0, -1) if sequences % d == 0]
    for recompute in (False, True):
        for micro in choices:
            needed = memory.estimate(config, precision, micro, recompute=recompute)
            if needed <= budget:
                how = "activations computed again in the backward pass" if recompute else "activations kept"
                return micro, recompute, f"about {needed / 1e9:.2f} of {budget / 1e9:.2f} GB, {how}"
    least = memory.estimate(config, precision, choices[-1], recompute=True)
    raise BadInput(
        f"{budget / 1e9:.2f} GB are too little: about {least / 1e9:.2f} GB are needed at least",
        field="training.memory",
        hint="Give more, or a smaller model, a shorter data.sequence_length, or training.precision=bf16-pure.",
    )


def _attention(config: RunConfig, device: torch.device, precision: Precision) -> tuple[str, str]:
    asked = config.training.attention
    narrow = torch.bfloat16 in (precision.autocast, precision.weights)
    missing = None
    if device.type != "cpu":
        missing = f"the device is {device.type}"
    elif asked == "native" or (asked == "auto" and narrow):
        missing = native_attention.unavailable()  # which compiles it where it is not compiled yet
    if asked == "native" and missing:
        raise BadInput(f"there is no native attention here: {missing}", field="training.attention", hint="Use auto.")
    if asked != "auto":
        return asked, "as asked"
    if device.type != "cpu":
        return "sdpa", "it takes the mask of document borders" if config.data.mask_documents else "torch's own kernels"
    if narrow and not missing:
        return "native", "no score leaves the cache"
    why = f"; native: {missing}" if missing else ""
    if config.data.mask_documents:
        return "blocked", f"blocks of queries meet no document but their own{why}"
    if narrow:
        # Issue 7, Zen 5: blocks won at 512 tokens; at 2,048 fp32 SDPA under `medium` did.
        short = config.data.sequence_length <= SHORT
        where = f"sequences {'of at most' if short else 'beyond'} {SHORT:,} tokens{why}"
        return "blocked" if short else "sdpa-fp32", f"torch's bf16 backward pass is slow on a CPU; {where}"
    return "sdpa", "torch's own kernels"


def _loss(config: RunConfig, device: torch.device) -> tuple[str, str]:
    asked = config.training.loss
    if asked == "linear" and config.training.z_loss:
        raise BadInput("linear has no z-loss", field="training.loss", hint="Use chunked, or training.z_loss=0.")
    missing = None
    if asked in ("auto", "native"):
        # Asking compiles it where it is not compiled yet.
        missing = native_loss.unavailable() if device.type == "cpu" else f"the device is {device.type}"
    if asked == "native" and missing:
        raise BadInput(f"there is no native loss here: {missing}", field="training.loss", hint="Use auto.")
    if asked != "auto":
        return asked, "as asked"
    return ("chunked" if missing else "native"), "never holds the logits"


def _update(device: torch.device) -> tuple[str, str]:
    missing = kernels.unavailable() if device.type == "cpu" else f"the device is {device.type}"
    what = "bf16 weights, rounded up or down at random"
    return ("torch", f"{what}; native: {missing}") if missing else ("native", f"{what}, in one pass over the memory")


def _micro_batch(config: RunConfig, device: torch.device, sequences: int) -> int:
    asked = config.training.micro_batch
    if asked != "auto":
        if sequences % asked:
            raise BadInput(
                f"{asked} does not divide the {sequences} sequences that a rank computes per step",
                field="training.micro_batch",
                hint=f"Divisors: {', '.join(str(d) for d in range(1, sequences + 1) if sequences % d == 0)}.",
            )
        return asked
    if device.type == "cuda":
        # Activations of one token without recomputation: about 34 widths per layer in 2 bytes, plus the MLP's.
        model = config.model
        per_token = 2 * model.num_hidden_layers * (16 * model.hidden_size + 4 * model.intermediate_size)
        room = torch.cuda.get_device_properties(device).total_memory * 0.5
        most = int(room / per_token / config.data.sequence_length)
    else:
        most = CPU_MICRO_TOKENS // config.data.sequence_length
    most = max(1, min(most, sequences))
    return max(d for d in range(1, most + 1) if sequences % d == 0)


def _compile(config: RunConfig, device: torch.device, world: int) -> tuple[bool, str]:
    asked = config.training.compile
    if asked in ("off", False):
        return False, "as asked"
    if device.type not in COMPILE_SECONDS:
        return False, f"not tried on {device.type}"
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return False, "no C++ compiler on this machine; g++ would make training faster"
    if asked in ("on", True):
        return True, "as asked"
    flops = flops_per_token(config.model, config.data.sequence_length)["training"]
    seconds = flops * config.tokens_per_step * config.total_steps / ASSUMED_FLOPS[device.type] / world
    saved, cost = seconds * (1 - 1 / COMPILE_GAIN), COMPILE_SECONDS[device.type]
    if saved > 1.5 * cost:
        return True, f"saves about {saved:,.0f} s of this run for {cost:.0f} s of compiling"
    return False, f"would save about {saved:,.0f} s of this run and cost {cost:.0f} s"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB)"
    return device.type


def _physical_cores(world: int) -> int:
    """Physical cores that this process may use, shared by the ranks of this machine."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        allowed = set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii"))
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores) // max(1, local_world))


# Dense bf16 (T4: fp16) peak of the makers' data sheets, FLOP/s, without sparsity.
_PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "T4": 65e12, "V100": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def known_peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a known GPU, for MFU; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
