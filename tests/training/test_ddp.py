"""DDP sums as the plain sum would, at every number of ranks, and a resumed run sums in the same order."""

from pathlib import Path
from typing import Any

import pytest
from launch import finish, ranks_of, start, start_ranks
from tiny import steps_of, tiny_file, weights_of

from smolforge.run import Run

AGAINST_A_PLAIN_SUM = """
import sys
sys.path.insert(0, {tests!r})
import copy, torch
import torch.distributed as dist
from tiny import TINY
from smolforge.config import RunConfig
from smolforge.distributed import init_distributed
from smolforge.model.architecture import build_model
from smolforge.training.optim import build_optimizer
from smolforge.training.plan import make_plan
from smolforge.training.step import replicate, train_step

ranks = init_distributed(torch.device("cpu"))
torch.set_num_threads(1)

def trained(name, precision, micro_batch, with_ddp):
    training = TINY["training"] | {{"precision": precision, "micro_batch": micro_batch}}
    optimizer = TINY["optimizer"] | {{"name": name}}
    config = RunConfig.model_validate(TINY | {{"training": training, "optimizer": optimizer}})
    plan = make_plan(config, torch.device("cpu"), ranks.world_size)
    model = build_model(config.model, **plan.model_options)
    optimizer = build_optimizer(model, config.optimizer, update=plan.update)
    replica = replicate(model, ranks) if with_ddp else None
    if not with_ddp:
        get_total_norm = torch.nn.utils.get_total_norm
        def summed(gradients):
            for gradient in gradients:
                dist.all_reduce(gradient)
            return get_total_norm(gradients)
        torch.nn.utils.get_total_norm = summed
    generator = torch.Generator().manual_seed(ranks.rank)
    for _ in range(3):
        tokens = torch.randint(320, (plan.sequences, 33), generator=generator)
        figures = train_step(model, optimizer, plan, config, tokens, None, lr=1e-2, ranks=ranks, replica=replica)
    if not with_ddp:
        torch.nn.utils.get_total_norm = get_total_norm
    return [float(figure) for figure in figures], list(model.parameters())

for case in [("adamw", "fp32", 4), ("adamw", "fp32", 1), ("adamw", "bf16-pure", 2), ("muon", "fp32", 2)]:
    (ours, weights), (theirs, expected) = trained(*case, True), trained(*case, False)
    assert ours == theirs, (case, ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True)), case
ranks.close()
sys.exit()
"""


def test_bitwise_the_plain_sum_of_two_ranks() -> None:
    program = AGAINST_A_PLAIN_SUM.format(tests=str(Path(__file__).parent))
    for process in [start([], environment, first=program) for environment in ranks_of(2)]:
        finish(process)


def trained(place: Path, name: str, world: int, steps: int, *more: str) -> Run:
    run = Run(place / name)
    words = [tiny_file(place), "--out", str(run.path), "--steps", str(steps), "--set", "schedule.name=constant",
             "--set", "evaluation.every=100", "--set", "samples.every=100", "--set", "data.lanes=12",
             "--set", "training.tokens_per_step=384", *more]  # fmt: skip
    for process in start_ranks(words, world):
        finish(process)
    return run


MUON, BF16, PARTS = ("optimizer.name=muon",), ("training.precision=bf16-pure",), ("training.micro_batch=1",)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), MUON, PARTS], ids=["adamw", "muon", "accumulated"])
def test_one_to_four_ranks(tmp_path: Path, options: tuple[str, ...]) -> None:
    more: list[Any] = [word for option in options for word in ("--set", option)]
    one, *others = (trained(tmp_path, f"run-{world}", world, 20, *more) for world in (1, 2, 3, 4))
    for run in others:
        ours, theirs = steps_of(run), steps_of(one)
        assert [(step, digest) for step, _, digest in ours] == [(step, digest) for step, _, digest in theirs]
        assert max(abs(a - b) for (_, a, _), (_, b, _) in zip(ours, theirs, strict=True)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), MUON, BF16], ids=["adamw", "muon", "bf16-pure"])
def test_three_ranks_resume_bitwise(tmp_path: Path, options: tuple[str, ...]) -> None:
    more = [word for option in options for word in ("--set", option)]
    whole = trained(tmp_path, "whole", 3, 10, *more)
    for steps in (5, 10):
        run = trained(tmp_path, "parts", 3, steps, *more)
    assert steps_of(run) == steps_of(whole) and weights_of(run) == weights_of(whole)


@pytest.mark.slow
def test_a_run_of_sixteen_lanes_continues_on_any_number_of_ranks(tmp_path: Path) -> None:
    shape = ["--set", "data.lanes=16", "--set", "training.tokens_per_step=512", "--set", "training.micro_batch=8"]
    one = trained(tmp_path, "one", 1, 20, *shape)
    for world, steps in ((1, 5), (3, 10), (5, 15), (2, 20)):
        run = trained(tmp_path, "several", world, steps, *shape)
    ours, theirs = steps_of(run), steps_of(one)
    assert [(step, digest) for step, _, digest in ours] == [(step, digest) for step, _, digest in theirs]
    assert max(abs(a - b) for (_, a, _), (_, b, _) in zip(ours, theirs, strict=True)) < 1e-6
