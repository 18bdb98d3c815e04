"""A run that has not begun: what would be decided, how long it would take, what it would store and send.

Decisions and memory are those of the plan. Times on GPUs, which need not be here, follow from the share of the peak
(MFU) that SmolLM2-135M reached on an H100, since nothing runs; on the CPU of this machine some steps are timed.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

from smolforge.config import RunConfig
from smolforge.devices import Gpu, gpu_named
from smolforge.errors import BadInput
from smolforge.formatting import count, duration, size
from smolforge.limits import available_memory
from smolforge.logging import quiet
from smolforge.model.summary import MemoryEstimate, count_parameters, flops_per_token
from smolforge.training.bench import step_seconds
from smolforge.training.plan import Plan, make_plan, memory_by_part, planned_memory
from smolforge.training.recipe import count_body, resolve_batch, resolve_recipe
from smolforge.training.scaling_law import expected_bits

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
PER_MACHINE = 8  # GPUs, where there are more
# Of a micro-batch of SmolLM2-135M on an H100 (docs/performance.md): the share of the peak by whether it is compiled,
# and the seconds that do not depend on its size.
SHARE, PASS_SECONDS = {True: 0.40, False: 0.27}, 0.012
TEXT_BYTES = 4.1  # in a token of SmolLM2's tokenizer: 4.0 of WikiText-2, 4.1 of classic books, 4.2 of TinyStories


def parse_gpus(text: str) -> tuple[int, Gpu | None]:
    """`8xH100` → (8, the card), `cpu` → (1, None); BadInput where no such card is known."""
    if text.strip().lower() == "cpu":
        return 1, None
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.+)", text.strip(), re.IGNORECASE)
    if match is None or match[1] == "0":
        raise BadInput(f"{text!r} names no GPUs", field="--on", hint="Write T4, 8xH100, A100-80GB, cpu.")
    return int(match[1] or 1), gpu_named(match[2])


@dataclass(frozen=True)
class Forecast:
    """What a run would be.

    Attributes:
        gpu: the card; None for the CPU of this machine.
        gpus: how many, one process each.
        mfu: assumed share of the GPUs' peak, counted as `flops_per_token` does; None for `SHARE` and `PASS_SECONDS`.
        price: of one GPU for an hour, 0 where it is not given.
        measured: seconds of a step, where some were timed.
    """

    config: RunConfig
    gpu: Gpu | None
    gpus: int
    plan: Plan
    memory: MemoryEstimate
    mfu: float | None
    price: float
    measured: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.config.total_steps * self.config.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together, or of the CPU."""
        if self.measured is not None:
            return self.config.tokens_per_step / self.measured
        length, peak = self.config.data.sequence_length, (self.gpu and self.gpu.peak_flops) or 0
        flops = flops_per_token(self.config.model, length)["training"]
        if self.mfu is not None:
            return self.gpus * self.mfu * peak / flops
        passes = self.plan.sequences / self.plan.micro_batch
        step = self.plan.sequences * length * flops / (SHARE[self.plan.compile] * peak) + passes * PASS_SECONDS
        return self.config.tokens_per_step / step

    @property
    def seconds(self) -> float:
        """Of training, without evaluation, samples and the start."""
        return self.tokens / self.tokens_per_second

    @property
    def cost(self) -> float:
        """Of all GPUs for the whole run, in the unit of `price`."""
        return self.seconds / 3600 * self.gpus * self.price

    @property
    def expected(self) -> tuple[float, float] | None:
        """Held-out bits per byte of English prose and their error; None where the weights are not new."""
        if self.config.init is not None or self.config.data.format != "text":
            return None
        return expected_bits(count_body(self.config), self.tokens)

    def _learned(self) -> list[str]:
        if self.expected is None:
            return []
        bits, error = self.expected
        return [f"expected: {bits:.2f} ± {error:.2f} bits per byte of held-out English prose (docs/recipes.md)"]

    @property
    def gpu_bytes(self) -> int:
        """Memory of a GPU in a step; of a CPU that of the whole process."""
        return self.memory.total - (self.memory.process if self.gpu else 0)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and moments, of all shards."""
        return self.plan.shards * (self.memory.weights + self.memory.moments)

    @property
    def step_bytes(self) -> float:
        """Bytes that each GPU sends in a step: gradients, of fsdp parameters too, of hsdp those between machines."""
        shards, copies, precision = self.plan.shards, self.gpus // self.plan.shards, self.plan.precision
        if copies > 1:
            return 2 * (copies - 1) / copies * self.memory.gradients
        # Each pass gathers all parameters for forward and backward, and sums the gradients in fp32.
        passes = self.plan.sequences // self.plan.micro_batch
        each = 2 * precision.products.itemsize + 4
        return passes * each * count_parameters(self.config.model) * (shards - 1) / shards

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able; bytes and seconds."""
        names = ("gpus", "mfu", "tokens", "tokens_per_second", "seconds", "gpu_bytes", "checkpoint_bytes", "step_bytes")
        found = {name: getattr(self, name) for name in names}
        found |= {"gpu": asdict(self.gpu) if self.gpu else None, "steps": self.config.total_steps}
        found |= {"memory": asdict(self.memory)}
        found |= {"tokens_per_step": self.config.tokens_per_step, "micro_batch": self.plan.micro_batch}
        found |= {"precision": self.plan.precision.name, "reasons": self.plan.reasons}
        found |= {"parallel": self.plan.parallel, "shards": self.plan.shards, "expected_bits_per_byte": self.expected}
        return found | ({"cost": self.cost} if self.price else {})

    def _written(self) -> str:
        return f", {size(self.checkpoint_bytes / self.gpus)} written by each process" if self.plan.shards > 1 else ""

    def lines(self) -> list[str]:
        """For people: the decisions, then the figures."""
        steps, rate, second = self.config.total_steps, self.tokens_per_second, self.seconds / self.config.total_steps
        parameters = count_parameters(self.config.model)
        fixed = f"{1e3 * PASS_SECONDS:.0f} ms a micro-batch"
        how = (f"at {SHARE[self.plan.compile]:.0%} of the peak and {fixed}", "; measured on one H100 only")
        if self.mfu is not None:
            how = (f"at an assumed {self.mfu:.0%} of the peak", "; measured nowhere")
        if self.measured is not None:
            how = ("as some steps took here", "; validation, samples and checkpoints come on top")
        lines = [
            *self.plan.reasons,
            f"length: {steps:,} steps, {count(self.tokens)} tokens, {self.tokens / parameters:.1f} for each parameter",
            f"time: {duration(self.seconds)} {how[0]} ({count(rate)} tokens/s, {second:.2g} s a step){how[1]}",
            *self._learned(),
            f"checkpoint: {size(self.checkpoint_bytes)}{self._written()}",
            f"data: about {size(rate * TEXT_BYTES)} of text a second",
        ]
        if self.gpus > 1:
            gigabits = 8 * self.step_bytes / (0.1 * second) / 1e9
            what = {"fsdp": "parameters and gradients", "hsdp": "gradients to other machines"}
            sent = f"{size(self.step_bytes)} of {what.get(self.plan.parallel, 'gradients')} from each GPU a step"
            lines.append(f"network: {sent}; {gigabits:.1f} Gbit/s keep that below a tenth of the step")
        if self.price:
            lines.append(f"cost: {self.cost:,.2f} at {self.price:g} per GPU and hour")
        has = self.gpu.memory if self.gpu else available_memory()
        if self.gpu_bytes > has:
            lines.append(f"THIS DOES NOT FIT: {size(self.gpu_bytes)} of {size(has)}; set training.memory")
        return lines


def forecast(
    config: RunConfig, gpus: int, gpu: Gpu | None, *, mfu: float | None = None, price: float = 0.0
) -> Forecast:
    """What the run of `config` would be on so many of these GPUs, one process each, `PER_MACHINE` in a machine.

    Without a GPU it is what the run would be on the CPU of this machine, where some steps are timed.

    Raises:
        BadInput: they cannot share its batch, or the memory that it sets is not enough.
    """
    device = CUDA if gpu else CPU
    config, recipe = resolve_recipe(resolve_batch(config, device))
    plan = make_plan(config, device, gpus, gpu, local=min(gpus, PER_MACHINE))
    plan.reasons.extend(recipe)
    memory, measured = planned_memory(config, plan, gpu), None
    if not gpu:
        plan.reasons.append(f"memory: {memory_by_part(memory, gpu)}")
        with quiet(logging.WARNING), torch.random.fork_rng(devices=[]):
            measured = step_seconds(config, plan)
    return Forecast(config, gpu, gpus, plan, memory, mfu, price, measured)
