"""Training speed of this machine: tokens/s, and its share of the speed of matrix products alone.

Floating point operations are those of `model.summary.flops_per_token`: matrix products and attention over all
positions, the masked half too, forward and backward, recomputation not counted. The speed of matrix products is
measured in the same run, on the model's own largest ones.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from smolforge.config import RunConfig, build_config
from smolforge.cuda_graph import WARM_UP
from smolforge.devices import choose_device, known_peak_flops
from smolforge.distributed import DistributedContext
from smolforge.formatting import size
from smolforge.model.architecture import build_model
from smolforge.model.summary import flops_per_token
from smolforge.training.apply_plan import apply_plan, compiled_graphs
from smolforge.training.metrics import memory_in_use
from smolforge.training.optim import build_optimizer
from smolforge.training.plan import Plan, make_plan
from smolforge.training.recorded import RecordedPasses
from smolforge.training.step import train_step

logger = logging.getLogger(__name__)

TIMED_FLOPS = 1e12  # of `step_seconds`, about five seconds of a laptop
PARTS = ("forward", "backward", "replay", "update")


def measure(
    preset: str = "smollm2-135m",
    *,
    length: int = 512,
    micro_batch: int = 4,
    steps: int = 5,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train on random tokens, which cost as much as any others.

    Args:
        length: tokens in a sequence.
        micro_batch: sequences in a step; one micro-batch, so that accumulation hides nothing, unless the overrides
            give a `training.memory` whose plan cuts it.
        steps: timed steps after one warm-up step; medians are reported.
        overrides: `key=value` as of --set, such as training.precision=bf16-pure.

    Raises:
        BadInput: a wrong configuration.
    """
    device = choose_device()
    batch = micro_batch * length
    given = [f"data.sequence_length={length}", f"training.tokens_per_step={batch}", "training.steps=1000"]
    if not any(override.startswith("training.memory=") for override in overrides):
        given.append(f"training.micro_batch={micro_batch}")
    config = build_config(preset, [*given, *overrides])
    plan = make_plan(config, device, 1)
    apply_plan(plan)
    graphs = compiled_graphs()
    first, *timings = _time_steps(config, plan, micro_batch, length, steps)
    whole = statistics.median(sum(parts.values()) for parts in timings)
    flops = flops_per_token(config.model, length)["training"] * batch / whole
    limit, peak = matmul_flops(config, plan, batch), known_peak_flops(device)
    return {
        "preset": preset, "device": str(device), "precision": plan.precision.name, "attention": plan.attention,
        "loss": plan.loss, "compiled_graphs": compiled_graphs() - graphs, "threads": plan.threads,
        "sequences": micro_batch, "length": length, "overrides": list(overrides),
        "tokens_per_second": batch / whole,
        "flops_per_second": flops, "matmul_flops_per_second": limit, "share_of_matmul_limit": flops / limit,
        "mfu": flops / peak if peak else None,
        "memory_bytes": memory_in_use(device),
        "first_step_seconds": sum(first.values()),
        "share_by_part": {
            name: statistics.median(parts[name] / sum(parts.values()) for parts in timings) for name in PARTS
        },
    }  # fmt: skip


def _time_steps(config: RunConfig, plan: Plan, sequences: int, length: int, steps: int) -> list[dict[str, float]]:
    """Seconds of each part of the first step and of `steps` timed ones; the warm-up between them is left out."""
    device = plan.device
    model = build_model(config.model, **plan.model_options)
    optimizer = build_optimizer(model, config.optimizer, update=plan.update, products=plan.precision.products)
    tokens = torch.randint(config.model.vocab_size, (sequences, length + 1), device=device)
    passes = RecordedPasses(model) if plan.graph else None
    timings: list[dict[str, float]] = []

    @contextlib.contextmanager
    def span(name: str) -> Iterator[None]:
        began = _now(device)
        yield
        timings[-1][name] += _now(device) - began

    warm_up = 1 + (WARM_UP if passes else 1)
    for number in range(steps + warm_up):
        timings.append(defaultdict(float))
        train_step(
            model, optimizer, plan, config, tokens, None,
            lr=config.optimizer.lr, ranks=DistributedContext(), span=span, passes=passes,
        )  # fmt: skip
        if number >= warm_up:
            speed = sequences * length / sum(timings[-1].values())
            logger.info(f"step {number - warm_up + 1}/{steps}: {speed:,.0f} tokens/s")
    return [timings[0], *timings[warm_up:]]


def step_seconds(config: RunConfig, plan: Plan) -> float:
    """Seconds of a step of the run of `config` on this machine, from some timed ones of one micro-batch each."""
    length = config.data.sequence_length
    flops = flops_per_token(config.model, length)["training"] * plan.micro_batch * length
    apply_plan(plan)
    _, *timings = _time_steps(config, plan, plan.micro_batch, length, min(max(int(TIMED_FLOPS / flops), 3), 30))
    *passes, update = (statistics.median(parts.get(name, 0.0) for parts in timings) for name in PARTS)
    return plan.sequences / plan.micro_batch * sum(passes) + update


def matmul_flops(config: RunConfig, plan: Plan, rows: int) -> float:
    """FLOP/s of the products of an MLP alone, (rows, D) x (D, I), in the precision of the run: the best of ten."""
    dtype = plan.precision.products
    width, inner = config.model.hidden_size, config.model.intermediate_size
    left = torch.randn(rows, width, device=plan.device).to(dtype)
    right = torch.randn(width, inner, device=plan.device).to(dtype)
    best = float("inf")
    for _ in range(10):
        began = _now(plan.device)
        torch.mm(left, right)
        best = min(best, _now(plan.device) - began)
    return 2 * rows * width * inner / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(result: dict[str, Any]) -> str:
    """The measurements as text."""
    parts = ", ".join(f"{name} {share:.0%}" for name, share in result["share_by_part"].items() if share)
    lines = [
        f"tokens/s          {result['tokens_per_second']:,.0f}"
        f" ({result['sequences']} x {result['length']:,} tokens, {result['precision']}, {result['attention']})",
        f"arithmetic        {result['flops_per_second'] / 1e9:,.0f} GFLOP/s,"
        f" {result['share_of_matmul_limit']:.0%} of this machine's {result['matmul_flops_per_second'] / 1e9:,.0f}",
        f"memory            {size(result['memory_bytes'])}",
        f"first step        {result['first_step_seconds']:.1f} s, {result['compiled_graphs']} graphs compiled",
        f"parts             {parts}",
    ]
    if result["mfu"]:
        counted = "attention counts all positions, recomputation does not"
        lines.insert(2, f"MFU               {result['mfu']:.1%} of the maker's dense peak; {counted}")
    return "\n".join(lines)
