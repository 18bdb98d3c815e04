"""Training on this machine: tokens/s, and what part of the matrix products' own speed that is.

Floating point operations are those of `model.summary.flops_per_token`: matrix products and causal attention, forward
and backward, recomputation not counted. The limit is measured in the same run, on the model's own largest products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from smolforge import config as configuration
from smolforge.config import RunConfig
from smolforge.distributed import DistributedContext
from smolforge.model.architecture import build_model
from smolforge.model.summary import flops_per_token
from smolforge.training import allocator, apply_plan, compiling, optim, plan
from smolforge.training.metrics import memory_in_use
from smolforge.training.update import Updater

PARTS = ("forward", "backward", "update")


def measure(
    preset: str = "smollm2-135m",
    *,
    length: int = 512,
    micro_batch: int = 4,
    steps: int = 5,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train on random tokens, which cost as much as any.

    Args:
        preset: whose model, optimizer and precision.
        length: tokens in a sequence.
        micro_batch: sequences in a step; one micro-batch, so that accumulation hides nothing, unless the overrides
            give a `training.memory`, whose plan may cut it.
        steps: measured steps after one that warms up; medians are reported.
        overrides: `key=value` as of --set, such as training.precision=bf16-pure.

    Raises:
        BadInput: the configuration is none.
    """
    device = plan.pick_device()
    given = [f"data.sequence_length={length}", "training.steps=1000"]
    if not any(override.startswith("training.memory=") for override in overrides):
        given.append(f"training.micro_batch={micro_batch}")
    config = configuration.build_config(
        preset, [*given, f"training.tokens_per_step={micro_batch * length}", *overrides]
    )
    chosen = plan.make_plan(config, device, 1)
    for reason in chosen.reasons:
        say(reason)
    torch.set_num_threads(chosen.threads)
    torch.set_float32_matmul_precision(chosen.precision.matmul)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    model = build_model(config.model, dtype=chosen.precision.weights, device=device, **chosen.model_options)
    optimizer = optim.build_optimizer(model, config.optimizer, device)
    apply_plan.apply_plan(optimizer, chosen)
    updater = Updater(model, optimizer, clip=config.training.grad_clip, ranks=DistributedContext())
    tokens = torch.randint(config.model.vocab_size, (micro_batch, length + 1), device=device)

    def step() -> list[float]:
        """Seconds of each part."""
        spent, total = [0.0, 0.0], torch.zeros((), device=device)
        for part in tokens.split(chosen.micro_batch):
            began = _now(device)
            with chosen.precision.context(device):
                inputs, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
                loss, nats = model.loss(inputs, targets, scale=1 / (micro_batch * length))
            forward = _now(device)
            updater.backward(loss)
            total += nats.float()
            spent = [spent[0] + forward - began, spent[1] + _now(device) - forward]
        began = _now(device)
        updater.step(config.optimizer.lr, total)
        return [*spent, _now(device) - began]

    compiled_before = compiling.graphs()
    first = sum(step())
    step()
    seconds = []
    for number in range(steps):
        seconds.append(step())
        say(f"step {number + 1}/{steps}: {micro_batch * length / sum(seconds[-1]):,.0f} tokens/s")
    whole = statistics.median(sum(parts) for parts in seconds)
    flops = flops_per_token(config.model, length)["training"] * micro_batch * length / whole
    limit, peak = matmul_flops(config, chosen, micro_batch * length), plan.known_peak_flops(device)
    return {
        "preset": preset, "device": str(device), "precision": chosen.precision.name, "attention": chosen.attention,
        "loss": chosen.loss, "compiled_graphs": compiling.graphs() - compiled_before, "threads": chosen.threads,
        "sequences": micro_batch, "length": length, "overrides": list(overrides),
        "tokens_per_second": micro_batch * length / whole,
        "flops_per_second": flops, "matmul_flops_per_second": limit, "share_of_matmul_limit": flops / limit,
        "mfu": flops / peak if peak else None,
        "memory_bytes": memory_in_use(device),
        "first_step_seconds": first,
        "share_by_part": {
            name: statistics.median(parts[i] / sum(parts) for parts in seconds) for i, name in enumerate(PARTS)
        },
    }  # fmt: skip


def matmul_flops(config: RunConfig, chosen: plan.Plan, rows: int) -> float:
    """FLOP/s of the products of an MLP alone, (rows, D) x (D, I), in the precision of the run: the best of ten."""
    dtype = chosen.precision.autocast or chosen.precision.weights
    width, inner = config.model.hidden_size, config.model.intermediate_size
    left = torch.randn(rows, width, device=chosen.device).to(dtype)
    right = torch.randn(width, inner, device=chosen.device).to(dtype)
    best = float("inf")
    for _ in range(10):
        began = _now(chosen.device)
        torch.mm(left, right)
        best = min(best, _now(chosen.device) - began)
    return 2 * rows * width * inner / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(result: dict[str, Any]) -> str:
    """The figures in words."""
    parts = ", ".join(f"{name} {share:.0%}" for name, share in result["share_by_part"].items())
    lines = [
        f"tokens/s          {result['tokens_per_second']:,.0f}"
        f" ({result['sequences']} x {result['length']:,} tokens, {result['precision']}, {result['attention']})",
        f"arithmetic        {result['flops_per_second'] / 1e9:,.0f} GFLOP/s,"
        f" {result['share_of_matmul_limit']:.0%} of this machine's {result['matmul_flops_per_second'] / 1e9:,.0f}",
        f"memory            {result['memory_bytes'] / 2**30:.1f} GiB",
        f"first step        {result['first_step_seconds']:.1f} s, {result['compiled_graphs']} graphs compiled",
        f"parts             {parts}",
    ]
    if result["mfu"]:
        lines.insert(2, f"MFU               {result['mfu']:.1%} of the maker's dense peak, recomputation not counted")
    return "\n".join(lines)
