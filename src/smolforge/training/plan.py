"""The plan: device, precision, batch, memory and kernels of a run, each decided once, with its reason.

A plan depends on the configuration and the machine only, never on a measurement: the same machine decides the same
again, so a resumed run computes exactly what the uninterrupted one would have.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch

from smolforge import kernels
from smolforge.config import RunConfig
from smolforge.devices import Gpu, gpu_of
from smolforge.errors import BadInput
from smolforge.formatting import plural
from smolforge.limits import available_memory, physical_cores
from smolforge.model import attention as attentions
from smolforge.model.lora import count_adapter_parameters
from smolforge.model.loss import chunk_of
from smolforge.model.summary import MemoryEstimate, estimate_memory, flops_per_token
from smolforge.training.parallel import choose_parallel
from smolforge.training.precision import Precision, choose_precision

# Tokens of one micro-batch on a CPU: enough rows to fill the matrix products, few enough to stay in memory.
CPU_MICRO_TOKENS = 4096
# What tuning on a CPU stays within by itself, every weight or an adapter: a laptop has other programs too.
TUNING_MEMORY, LORA_MEMORY = 4_000_000_000, 2_000_000_000
# Of an amount of memory, what tuning on a CPU is planned for where that is enough: SmolLM2-135M's peak was up to 12%
# above the estimate.
TUNING_SHARE = 0.9
# Longest sequence for which blocked attention is chosen in bf16 on a CPU; between the two lengths that were measured.
SHORT = 1024
# What compiling costs and gains, from docs/performance.md: it must pay for itself well within the run.
COMPILE_SECONDS = {"cpu": 40.0, "cuda": 20.0}
COMPILE_GAIN = {"cpu": 1.25, "cuda": 1.5}
ASSUMED_FLOPS = {"cpu": 2e11, "cuda": 2.7e14}


@dataclass(frozen=True)
class Plan:
    """Decisions of one run on one machine.

    Attributes:
        sequences: most sequences of the global batch that a rank computes in a step.
        micro_batch: sequences of one forward pass; divides `sequences`. A rank with fewer ends with a smaller one.
        compile: whether blocks, loss and update go through torch.compile.
        graph: whether passes are recorded as CUDA graphs.
        threads: of matrix products on a CPU.
        attention: a key of `model.attention.ATTENTION`.
        loss: a key of `model.loss.LOSSES`.
        update: which code updates weights in bf16, as of `optim.OptimizerBuilder`.
        recompute: whether the backward pass computes each layer's activations again instead of keeping them.
        parallel: how the ranks share the run, as of `parallel.choose_parallel`.
        shards: into how many shards the state is cut; 1 where each rank has all of it.
        reasons: one line per decision, for the terminal and the report.
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
    parallel: str = "single"
    shards: int = 1
    graph: bool = False
    reasons: list[str] = field(default_factory=list)

    @property
    def model_options(self) -> dict[str, Any]:
        """The keyword arguments of `build_model` that the plan decides."""
        # Only a few rows of the embedding's gradient are not zero; all_reduce needs it whole.
        sparse = self.device.type == "cpu" and not torch.distributed.is_initialized()
        return {
            "dtype": self.precision.weights,
            "device": self.device,
            "attention": self.attention,
            "loss": self.loss,
            "recompute": self.recompute,
            "sparse_embedding": sparse,
            "compile": self.compile,
        }


def make_plan(
    config: RunConfig, device: torch.device, world_size: int, gpu: Gpu | None = None, *, local: int | None = None
) -> Plan:
    """Decide all that the configuration leaves to the machine; BadInput where the machine cannot do what was asked.

    Args:
        gpu: a GPU to plan for, of each process; that of `device` unless given.
        local: processes of each machine; all unless given.
    """
    sequences = _share(config, world_size)
    gpu = gpu or gpu_of(device)
    processes = plural(world_size, "process", "es")
    reasons = [f"device: {gpu or device.type}" + (f", {processes}" if world_size > 1 else "")]
    precision, reason = choose_precision(config.training.precision, device, gpu)
    reasons.append(f"precision: {precision.name} ({reason})")
    attention, attention_reason = _choose_attention(config, device, precision, gpu)
    parallel, shards, parallel_reason = _choose_parallel(config, device, precision, world_size, local, gpu)
    if parallel != "single":
        reasons.append(f"parallel: {parallel} ({parallel_reason})")
    compiled, compile_reason = _choose_compile(config, device, world_size)
    estimate = partial(
        memory_of, config, device, precision, gpu=gpu, shards=shards, copies=parallel == "ddp", sequences=sequences,
        compiled=compiled and gpu is not None,
    )  # fmt: skip
    micro, recompute, memory = _fit_memory(config, device, sequences, gpu, estimate)
    reasons.append(
        f"batch: {config.tokens_per_step:,} tokens per step = {processes} × "
        f"{'at most ' if config.sequences_per_step % world_size else ''}"
        f"{plural(sequences // micro, 'micro-batch', 'es')} × "
        f"{plural(micro, 'sequence')} of {plural(config.data.sequence_length, 'token')}"
    )
    if memory:
        reasons.append(f"memory: {memory}")
    reasons.append(f"attention: {_for_people(attention)} ({attention_reason})")
    loss, reason = _choose_loss(config, device, precision)
    reasons.append(f"loss: {_for_people(loss)} ({reason})")
    update = "torch"
    if precision.weights == torch.bfloat16 and config.optimizer.name == "adamw":
        update, reason = _choose_update(device, compiled)
        reasons.append(f"update: {_for_people(update)} ({reason})")
    if "native" in (attention, loss, update):
        reasons.append(f"kernels: {kernels.description()}")
    reasons.append(f"compile: {'on' if compiled else 'off'} ({compile_reason})")
    graph = False
    if gpu:
        graph, reason = _choose_graph(config, precision, parallel)
        reasons.append(f"graph: {'on' if graph else 'off'} ({reason})")
    threads = config.training.threads or physical_cores(world_size)
    if device.type == "cpu":
        reasons.append(f"threads: {threads}")
    return Plan(
        device, precision, sequences, micro, compiled, threads, attention, loss, update, recompute, parallel, shards,
        graph, reasons,
    )  # fmt: skip


def _share(config: RunConfig, world_size: int) -> int:
    """Sequences of a step that the rank with the most of them computes."""
    sequences = config.sequences_per_step
    if sequences < world_size:
        raise BadInput(
            f"a step has {plural(sequences, 'sequence')}, too few for {world_size} processes",
            field="training.tokens_per_step",
            hint=f"Start at most {sequences}.",
        )
    return -(-sequences // world_size)


def _choose_parallel(
    config: RunConfig, device: torch.device, precision: Precision, world: int, local: int | None, gpu: Gpu | None
) -> tuple[str, int, str]:
    budget = config.training.memory
    if budget == "auto":
        budget = gpu.memory / 2 if gpu else None  # as of `_micro_batch`

    def needed(shards: int) -> int:
        memory = memory_of(
            config, device, precision, 1, recompute=False, gpu=gpu, shards=shards, copies=shards == 1,
            sequences=_share(config, world),
        )  # fmt: skip
        return memory.total - (memory.process if gpu else 0)

    return choose_parallel(config, precision, world, local or world, needed, budget)


def _fit_memory(
    config: RunConfig, device: torch.device, sequences: int, gpu: Gpu | None, estimate: Callable[..., MemoryEstimate]
) -> tuple[int, bool, str]:
    """Micro-batch, whether to recompute activations, and the reason where memory decided; `estimate` as `memory_of`."""
    budget, asked = config.training.memory, config.training.micro_batch
    tunes = device.type == "cpu" and config.data.format != "text"
    share, must_fit = TUNING_SHARE if tunes else 1.0, budget != "auto"
    if budget == "auto" and tunes:
        budget = LORA_MEMORY if config.lora.r else TUNING_MEMORY
    if budget == "auto":
        micro = _micro_batch(config, sequences, gpu, estimate)
        return micro, False, memory_by_part(estimate(micro, recompute=False), gpu) if gpu else ""
    choices = _divisors(sequences)
    if asked != "auto" or not must_fit:
        most = _micro_batch(config, sequences, gpu, estimate)
        choices = [most] if asked != "auto" else [micro for micro in choices if micro <= most]
    for limit, recompute, micro in product((share * budget, budget), (False, True), choices):
        needed = estimate(micro, recompute=recompute).total
        if needed <= limit:
            how = "activations computed again in the backward pass" if recompute else "activations kept"
            return micro, recompute, f"about {needed / 1e9:.2f} of {budget / 1e9:.2f} GB, {how}"
    least = estimate(choices[-1], recompute=True).total
    if not must_fit:
        return choices[-1], True, f"about {least / 1e9:.2f} GB, activations computed again in the backward pass"
    raise BadInput(
        f"{budget / 1e9:.2f} GB are not enough: at least about {least / 1e9:.2f} GB are needed",
        field="training.memory",
        hint="Give more, or use a smaller model, a shorter data.sequence_length, or training.precision=bf16-pure.",
    )


def memory_by_part(found: MemoryEstimate, gpu: Gpu | None) -> str:
    """The memory of a step on a GPU, or of the whole process on a CPU, and what it consists of."""
    parts = {"state": found.state, "exchange": found.exchange, "activations": found.activations, "head": found.head}
    if not gpu:
        parts |= {"a copy to save": found.saving, "Python and torch": found.process}
    shares = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    has = gpu.memory if gpu else available_memory()
    return f"about {sum(parts.values()) / 1e9:.2f} of {has / 1e9:.2f} GB ({shares})"


def memory_of(
    config: RunConfig, device: torch.device, precision: Precision, micro_batch: int, *, recompute: bool,
    gpu: Gpu | None = None, shards: int = 1, copies: bool = False, sequences: int = 1,
    compiled: bool = False,
) -> MemoryEstimate:  # fmt: skip
    """The memory of one rank's training step. Where a GPU trains, the copy for saving lies in the host's memory.

    Args:
        sequences: of the rank, in a step.
        compiled: whether a GPU's blocks are.
    """
    gpu = gpu or gpu_of(device)
    return estimate_memory(
        config.model, sequences=micro_batch, length=config.data.sequence_length,
        stored=precision.weights, computed=precision.autocast, optimizer=config.optimizer.name, recompute=recompute,
        loss=_choose_loss(config, device, precision)[0], chunk=chunk_of(device),
        attention=_choose_gpu_attention(config, gpu, precision)[0] if gpu else None, compiled=compiled,
        masked=config.data.mask_documents,
        save_copy=config.checkpoint.asynchronous and device.type == "cpu",
        adapter=count_adapter_parameters(config.model, config.lora),
        dropout=config.training.dropout > 0, average=config.training.ema > 0, shards=shards,
        copies=copies, accumulated=micro_batch < sequences,
    )  # fmt: skip


def planned_memory(config: RunConfig, plan: Plan, gpu: Gpu | None = None) -> MemoryEstimate:
    """The memory of one rank's training step as it is planned; `gpu` as of `make_plan`."""
    return memory_of(
        config, plan.device, plan.precision, plan.micro_batch, recompute=plan.recompute, gpu=gpu, shards=plan.shards,
        copies=plan.parallel == "ddp", sequences=plan.sequences, compiled=plan.compile and plan.device.type == "cuda",
    )  # fmt: skip


def _micro_batch(config: RunConfig, sequences: int, gpu: Gpu | None, estimate: Callable[..., MemoryEstimate]) -> int:
    """The micro-batch as asked; otherwise the largest that fits half of a GPU's memory, or few enough for a CPU.

    It divides the `sequences` of a rank: where what was asked for does not, it is the next smaller number that does.
    """
    asked, choices = config.training.micro_batch, _divisors(sequences)
    if asked != "auto":
        whole = config.sequences_per_step
        if whole % asked:
            raise BadInput(
                f"{asked} does not divide the {whole} sequences of a step",
                field="training.micro_batch",
                hint=f"Divisors: {', '.join(map(str, reversed(_divisors(whole))))}.",
            )
        return next(d for d in choices if d <= asked)
    if not gpu:
        most = max(1, CPU_MICRO_TOKENS // config.data.sequence_length)
        return next(d for d in choices if d <= most)
    # Half: what the backward pass holds besides, workspaces and fragments are not in the estimate.
    half = gpu.memory / 2
    needed = (estimate(d, recompute=False) for d in choices)
    return next((d for d, memory in zip(choices, needed, strict=True) if memory.total - memory.process <= half), 1)


def _divisors(count: int) -> list[int]:
    """All divisors, the largest first."""
    return [d for d in range(count, 0, -1) if count % d == 0]


def _choose_attention(
    config: RunConfig, device: torch.device, precision: Precision, gpu: Gpu | None
) -> tuple[str, str]:
    asked = config.training.attention
    if asked == "flex" and not gpu:
        raise BadInput("flex attention trains on CUDA only", field="training.attention", hint="Use auto.")
    bf16 = torch.bfloat16 in (precision.autocast, precision.weights)
    missing = None
    if device.type != "cpu":
        missing = f"the device is {device.type}"
    elif asked == "native" or (asked == "auto" and bf16):
        missing = attentions.native_unavailable()  # which loads the library, and may compile it
    if asked == "native" and missing:
        raise BadInput(f"native attention is not available: {missing}", field="training.attention", hint="Use auto.")
    if gpu:
        return _choose_gpu_attention(config, gpu, precision)
    if asked != "auto":
        return asked, "as asked"
    if device.type != "cpu":
        return "sdpa", "torch's own kernels"
    if bf16 and not missing:
        return "native", "scores are never stored in memory"
    why = f"; native: {missing}" if missing else ""
    if config.data.mask_documents:
        return "blocked", f"blocks of queries skip other documents{why}"
    if bf16:
        # Measured on Zen 5: blocks were faster at 512 tokens, SDPA in fp32 under `medium` at 2,048.
        short = config.data.sequence_length <= SHORT
        where = f"sequences {'of at most' if short else 'beyond'} {SHORT:,} tokens{why}"
        return "blocked" if short else "sdpa-fp32", f"torch's bf16 backward pass is slow on a CPU; {where}"
    return "sdpa", "torch's own kernels"


def _choose_gpu_attention(config: RunConfig, gpu: Gpu, precision: Precision) -> tuple[str, str]:
    """As asked, or what keeps no scores: flash where GPU and precision have it, else the kernel without groups."""
    asked, missing = config.training.attention, None
    if not gpu.has_bf16:  # the same ones have no flash kernel
        missing = f"{gpu.name} has no flash kernel"
    elif precision.autocast is None and precision.weights == torch.float32:
        missing = "the flash kernel needs 16 bits"
    elif config.data.mask_documents or asked == "varlen":
        missing = attentions.varlen_unavailable()
    if asked == "varlen" and missing:
        raise BadInput(f"varlen attention is not available: {missing}", field="training.attention", hint="Use auto.")
    if asked != "auto":
        return asked, "as asked"
    if missing:
        return "expanded", f"{missing}; a key/value head for each query head, for the memory-efficient one"
    if config.data.mask_documents:
        return "varlen", "flash kernel; documents end to end, without a mask"
    return "sdpa", "flash kernel"


def _choose_loss(config: RunConfig, device: torch.device, precision: Precision) -> tuple[str, str]:
    asked = config.training.loss
    if asked == "linear" and precision.scaler:
        problem = "linear sums the losses in fp16, which ends at 65,504"
        raise BadInput(problem, field="training.loss", hint="Use chunked.")
    if asked == "linear" and config.training.z_loss:
        raise BadInput("linear has no z-loss", field="training.loss", hint="Use chunked, or training.z_loss=0.")
    missing = _no_kernels(device) if asked in ("auto", "native") else None
    if asked == "native" and missing:
        raise BadInput(f"the native loss is not available: {missing}", field="training.loss", hint="Use auto.")
    if asked != "auto":
        return asked, "as asked"
    return ("chunked" if missing else "native"), "the logits are never stored as a whole"


def _no_kernels(device: torch.device) -> str | None:
    return kernels.unavailable() if device.type == "cpu" else f"the device is {device.type}"


def _choose_update(device: torch.device, compiled: bool) -> tuple[str, str]:
    missing = _no_kernels(device)
    what = "bf16 weights with stochastic rounding"
    if not missing:
        return "native", f"{what}, in one pass over the memory"
    return "compiled" if compiled else "torch", f"{what}; native: {missing}"


def _choose_compile(config: RunConfig, device: torch.device, world_size: int) -> tuple[bool, str]:
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
    seconds = flops * config.tokens_per_step * config.total_steps / ASSUMED_FLOPS[device.type] / world_size
    saved, cost = seconds * (1 - 1 / COMPILE_GAIN[device.type]), COMPILE_SECONDS[device.type]
    if saved > 1.5 * cost:
        return True, f"saves about {saved:,.0f} s of this run for {cost:.0f} s of compiling"
    return False, f"would save about {saved:,.0f} s of this run and cost {cost:.0f} s"


def _choose_graph(config: RunConfig, precision: Precision, parallel: str) -> tuple[bool, str]:
    if parallel != "single":
        return False, "several processes exchange gradients in between"
    if precision.scaler:
        return False, "the scale of gradients changes"
    if config.data.format != "text":
        return False, "the tokens that are learned differ from step to step"
    if config.training.memory != "auto":
        return False, "it would keep its memory, and training.memory is limited"
    return True, "a micro-batch starts at once, not kernel by kernel"


def _for_people(choice: str) -> str:
    return "native C++" if choice == "native" else choice
