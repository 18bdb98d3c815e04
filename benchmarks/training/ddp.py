"""What summing gradients over processes costs: DDP beside sums after the backward pass, in one run, steps in turn.

    torchrun --nproc-per-node 2 benchmarks/training/ddp.py [PRESET] [STEPS] [KEY=VALUE ...]

Prints one line of JSON with medians in seconds over the slowest process: a whole step; the sums in it (the step minus
the same step without sums, so what DDP hides behind the backward pass does not count); and, on a CPU, for how long
gradients are summed after the last of them was made.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

from smolforge.config import build_config
from smolforge.devices import choose_device
from smolforge.distributed import DistributedContext, init_distributed
from smolforge.model.architecture import build_model
from smolforge.training.apply_plan import apply_plan
from smolforge.training.optim import build_optimizer
from smolforge.training.plan import make_plan
from smolforge.training.step import replicate, train_step

BUCKET_BYTES = 32 << 20
WARM_UP = 2


class Contestant:
    """A model of its own, trained by one of three ways to share gradients: "ddp", "sum" after all, or "none"."""

    def __init__(self, way: str, config, plan, ranks: DistributedContext) -> None:
        self.way, self.config, self.plan, self.ranks = way, config, plan, ranks
        self.model = build_model(config.model, seed=0, **plan.model_options)
        self.optimizer = build_optimizer(self.model, config.optimizer, update=plan.update)
        self.replica = replicate(self.model, ranks) if way == "ddp" else None
        self.seconds: list[float] = []
        self.after: list[float] = []
        self.made = self.summed = 0.0  # when the last gradient was made, and when all were summed
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(self._note)
        if way == "sum":
            self.optimizer.register_step_pre_hook(lambda *_: self._sum())

    def _note(self, _: torch.Tensor) -> None:
        self.made = time.perf_counter()

    @contextlib.contextmanager
    def _span(self, name: str) -> Iterator[None]:
        yield
        if name == "backward":  # DDP returns from it once all is summed
            self.summed = time.perf_counter()

    def _sum(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        for bucket in _take_tensors(gradients, BUCKET_BYTES):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                gradient.copy_(summed)
        self.summed = time.perf_counter()

    def step(self, tokens: torch.Tensor) -> None:
        """One timed step."""
        self.ranks.barrier()
        began = time.perf_counter()
        train_step(
            self.model, self.optimizer, self.plan, self.config, tokens, None,
            lr=1e-3, ranks=self.ranks, replica=self.replica, span=self._span,
        )  # fmt: skip
        if tokens.device.type == "cuda":
            torch.cuda.synchronize()
        for found, mine in ((self.seconds, time.perf_counter() - began), (self.after, self.summed - self.made)):
            found.append(max(self.ranks.all_gather(mine)))


def main(preset: str = "pocket", steps: str = "10", *overrides: str) -> None:
    """Time the ways and print the result."""
    device = choose_device()
    ranks = init_distributed(device)
    # Clipping would come before the sums that a hook makes.
    config = build_config(preset, ["training.grad_clip=0", "training.steps=1000", *overrides])
    plan = make_plan(config, device, ranks.world_size)
    apply_plan(plan)
    generator = torch.Generator().manual_seed(ranks.rank)
    shape = (plan.sequences, config.data.sequence_length + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    contestants = [Contestant(way, config, plan, ranks) for way in ("none", "sum", "ddp")]
    for _ in range(WARM_UP + int(steps)):
        for contestant in contestants:
            contestant.step(tokens)
    pairs = zip(*(c.model.state_dict().values() for c in contestants[1:]), strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    medians = {c.way: statistics.median(c.seconds[WARM_UP:]) for c in contestants}
    after = {c.way: statistics.median(c.after[WARM_UP:]) for c in contestants if c.way != "none"}
    if ranks.is_main:
        found = {
            "processes": ranks.world_size,
            "preset": preset,
            "parameters": sum(p.numel() for p in contestants[0].model.parameters()),
            "step_seconds": medians,
            "sum_seconds": {way: medians[way] - medians["none"] for way in ("sum", "ddp")},
            "after_the_last_gradient_seconds": after if device.type == "cpu" else None,
            "largest_difference_of_weights": difference,
        }
        print(json.dumps(found))
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
