"""Several ranks train as one does, with copies (DDP) and with shards (FSDP2), and a run moves between all of them."""

import json
import random
import signal
from pathlib import Path

import launch
import pytest
import torch
from launch import finish, is_saving, ranks_of, start, start_ranks, wait_until
from tiny import TINY, steps_of, tiny_file

from smolforge.checkpoint import commit
from smolforge.checkpoint.state import load_state
from smolforge.checkpoint.weights import read_weights
from smolforge.config import RunConfig, build_config
from smolforge.devices import gpu_named
from smolforge.errors import BadInput
from smolforge.metrics_log import read_metrics
from smolforge.run import Run
from smolforge.training.plan import Plan, make_plan, memory_of
from smolforge.training.precision import choose_precision

CPU = torch.device("cpu")
MUON, BF16, PARTS = "optimizer.name=muon", "training.precision=bf16-pure", "training.micro_batch=1"
FSDP, HSDP = "training.parallel=fsdp", "training.parallel=hsdp"


def trained(place: Path, name: str, world: int, steps: int, *more: str, local: int | None = None) -> Run:
    """The tiny run on `world` ranks, `local` of them on each machine, until it has `steps` steps."""
    run = Run(place / name)
    given = ["schedule.name=constant", "evaluation.every=100", "samples.every=100", "data.lanes=12",
             "training.tokens_per_step=384", *more]  # fmt: skip
    words = [tiny_file(place), "--out", str(run.path), "--steps", str(steps)]
    words += [word for option in given for word in ("--set", option)]
    machine = {} if local is None else {"LOCAL_WORLD_SIZE": str(local)}
    for process in [start(words, environment | machine) for environment in ranks_of(world)]:
        finish(process)
    return run


def last(run: Run) -> Path:
    return run.checkpoints_path / "last"


def all_of(run: Run) -> dict[str, torch.Tensor]:
    """Weights and moments of the newest checkpoint."""
    moments = load_state(last(run) / "training")["optimizer"]
    named = {f"{name} {key}": value for name, state in moments.items() for key, value in state.items()}
    return {**read_weights(last(run)), **named}


def assert_same_run(run: Run, other: Run) -> None:
    """Equal batches, and losses as near as fp32 sums in another order are."""
    ours, theirs = steps_of(run), steps_of(other)
    assert [(step, digest) for step, _, digest in ours] == [(step, digest) for step, _, digest in theirs]
    assert max(abs(a - b) for (_, a, _), (_, b, _) in zip(ours, theirs, strict=True)) < 1e-6


def test_shards_train_as_one_rank_does_and_are_saved_as_a_model(tmp_path: Path) -> None:
    # 12 sequences on 2 ranks, then on one; validation and samples on the way.
    more = ("evaluation.every=4", "samples.every=4", "checkpoint.every=4")
    one = trained(tmp_path, "one", 1, 6, *more)
    trained(tmp_path, "sharded", 2, 4, FSDP, *more)
    run = Run(tmp_path / "sharded")
    names = {path.relative_to(last(run)).as_posix() for path in last(run).rglob("*.safetensors")}
    assert names == {f"{stem}-0000{n}-of-00002.safetensors" for stem in ("model", "training/tensors") for n in (1, 2)}
    assert not commit.verify(last(run)) and not list(run.checkpoints_path.glob(".*"))
    index = json.loads((last(run) / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in read_weights(last(run)).values())
    trained(tmp_path, "sharded", 1, 6, FSDP, *more)
    assert_same_run(run, one)
    assert (last(run) / "model.safetensors").is_file() and not (last(run) / "model.safetensors.index.json").exists()
    ours, theirs = all_of(run), all_of(one)
    assert ours.keys() == theirs.keys()
    # A moment that is nearly zero can round to another sign of the update.
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5) for name in ours)
    first, second = ([row["validation"]["loss"] for row in read_metrics(r) if "validation" in row] for r in (run, one))
    assert first == pytest.approx(second, abs=1e-6)
    assert run.samples_path.read_text().count("\n") == one.samples_path.read_text().count("\n") > 0


def configured(**training: object) -> RunConfig:
    return RunConfig.model_validate(TINY | {"training": TINY["training"] | training})


def choice(config: RunConfig, world: int, local: int | None = None) -> tuple[str, int, str]:
    plan: Plan = make_plan(config, CPU, world, local=local)
    (reason,) = [reason for reason in plan.reasons if reason.startswith("parallel: ")]
    return plan.parallel, plan.shards, reason


def test_the_strategy_follows_from_the_memory_estimate() -> None:
    assert choice(configured(), 4)[:2] == ("ddp", 1)
    assert make_plan(configured(parallel="hsdp"), CPU, 1).parallel == "single"
    assert choice(configured(parallel="fsdp"), 3) == ("fsdp", 3, "parallel: fsdp (as asked)")
    assert choice(configured(parallel="hsdp"), 8, 4)[:2] == ("hsdp", 4)
    with pytest.raises(BadInput, match=r"hsdp needs several machines"):
        make_plan(configured(parallel="hsdp"), CPU, 4)

    def large(memory: str, **model: int) -> RunConfig:
        more = ["training.precision=fp32", "training.tokens_per_step=16384", f"training.memory={memory}"]
        return build_config("smollm2-1.7b", more)

    assert choice(large("60GB"), 8)[0] == "ddp"
    name, shards, reason = choice(large("30GB"), 8)
    assert (name, shards) == ("fsdp", 8) and "of 30.00 GB" in reason and "with a copy on each" in reason
    assert choice(large("30GB"), 8, 4)[:2] == ("hsdp", 4)


def test_what_cannot_be_sharded_is_refused() -> None:
    for training, optimizer, what in (
        ({"precision": "fp16"}, {}, "gradients that are scaled"),
        ({}, {"name": "adamw8bit"}, "moments in 8 bits"),
        ({"ema": 10}, {}, "an average of the weights"),
    ):
        config = RunConfig.model_validate(
            TINY | {"training": TINY["training"] | {"parallel": "fsdp"} | training, "optimizer": optimizer}
        )
        with pytest.raises(BadInput, match=rf"training.parallel: fsdp does not shard {what}"):
            make_plan(config, torch.device("cuda"), 2, gpu_named("T4"))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", [(), (MUON,), (PARTS,)], ids=["adamw", "muon", "accumulated"])
def test_one_to_four_ranks(tmp_path: Path, options: tuple[str, ...], parallel: str) -> None:
    more = (f"training.parallel={parallel}", *options)
    one, *others = (trained(tmp_path, f"run-{world}", world, 20, *more) for world in (1, 2, 3, 4))
    for run in others:
        assert_same_run(run, one)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", [(), (MUON,), (BF16,)], ids=["adamw", "muon", "bf16-pure"])
def test_three_ranks_resume_bitwise(tmp_path: Path, options: tuple[str, ...], parallel: str) -> None:
    more = (f"training.parallel={parallel}", *options)
    whole = trained(tmp_path, "whole", 3, 10, *more)
    for steps in (5, 10):
        run = trained(tmp_path, "parts", 3, steps, *more)
    ours, theirs = all_of(run), all_of(whole)
    assert steps_of(run) == steps_of(whole) and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), (MUON,)], ids=["adamw", "muon"])
def test_shards_of_four_ranks_continue_on_two_and_on_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    one = trained(tmp_path, "one", 1, 15, *options)
    for world, steps in ((4, 5), (2, 10), (1, 15)):
        run = trained(tmp_path, "several", world, steps, FSDP, *options)
    assert_same_run(run, one)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), (MUON,), ("training.micro_batch=2",)], ids=["adamw", "muon", "accumulated"])
def test_shards_within_machines_and_copies_among_them(tmp_path: Path, options: tuple[str, ...]) -> None:
    one = trained(tmp_path, "one", 1, 10, *options)
    run = trained(tmp_path, "machines", 4, 5, HSDP, *options, local=2)
    run = trained(tmp_path, "machines", 4, 10, HSDP, *options, local=2)
    assert_same_run(run, one)


@pytest.mark.slow
def test_shards_compiled_and_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 600.0)
    one = trained(tmp_path, "one", 1, 5)
    precision, _ = choose_precision("fp32", CPU)
    config = configured(parallel="fsdp", tokens_per_step=384)
    least = memory_of(config, CPU, precision, 6, recompute=True, shards=2).total
    assert least < memory_of(config, CPU, precision, 6, recompute=False, shards=2).total
    for options in ((f"training.memory={least}", "training.micro_batch=6"), ("training.compile=on",)):
        run = trained(tmp_path, options[0], 2, 5, FSDP, *options)
        assert_same_run(run, one)
        decisions = json.loads((run.path / "environment.json").read_text())["decisions"]
        assert any("computed again" in reason or "compile: on" in reason for reason in decisions)


@pytest.mark.slow
def test_shards_in_other_precisions(tmp_path: Path) -> None:
    for precision in ("bf16", "bf16-pure"):
        copies, shards = (
            trained(tmp_path, f"{precision}-{p}", 2, 10, f"training.precision={precision}", f"training.parallel={p}")
            for p in ("ddp", "fsdp")
        )
        losses = [[loss for _, loss, _ in steps_of(run)] for run in (copies, shards)]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.slow
def test_transformers_loads_a_checkpoint_of_four_sharded_ranks(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = trained(tmp_path, "run", 4, 5, FSDP)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(last(run))
    ours, found = read_weights(last(run)), theirs.state_dict()
    assert len(list(last(run).glob("model-*.safetensors"))) == 4
    assert all(torch.equal(found[name], weight) for name, weight in ours.items())
    assert transformers.AutoTokenizer.from_pretrained(last(run)).encode("Once")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_while_all_ranks_write(tmp_path: Path, rank: int) -> None:
    run = Run(tmp_path / "run")
    words = [tiny_file(tmp_path), "--out", str(run.path), "--steps", "40", "--set", FSDP,
             "--set", "checkpoint.every=1", "--set", "checkpoint.keep=50"]  # fmt: skip
    dice, times = random.Random(rank), 0
    for _ in range(6):
        processes = start_ranks(words, 2)
        stands = max(commit.steps(run.checkpoints_path), default=0) + dice.randint(1, 4)

        def is_due(stands: int = stands) -> bool:
            return max(commit.steps(run.checkpoints_path), default=0) >= stands and is_saving(run)

        if not wait_until(is_due, processes[rank], interval=0):
            break
        processes[rank].send_signal(signal.SIGKILL)
        finish(processes[rank], -signal.SIGKILL)
        finish(processes[1 - rank], 1)
        times += 1
    for process in start_ranks(words, 2):
        finish(process)
    whole = trained_as(words, tmp_path / "whole")
    assert times >= 3 and all(not commit.verify(each) for each in run.checkpoints_path.glob("step-*"))
    assert steps_of(run) == steps_of(whole) and not list(run.checkpoints_path.glob(".*"))


def trained_as(words: list[str], out: Path) -> Run:
    """The same run elsewhere, undisturbed."""
    for process in start_ranks([words[0], "--out", str(out), *words[3:]], 2):
        finish(process)
    return Run(out)


@pytest.mark.slow
def test_a_run_of_sixteen_lanes_continues_on_any_number_of_ranks(tmp_path: Path) -> None:
    shape = ("data.lanes=16", "training.tokens_per_step=512", "training.micro_batch=8")
    one = trained(tmp_path, "one", 1, 20, *shape)
    for world, steps in ((1, 5), (3, 10), (5, 15), (2, 20)):
        run = trained(tmp_path, "several", world, steps, *shape)
    assert_same_run(run, one)
