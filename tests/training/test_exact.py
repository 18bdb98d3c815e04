"""E1 and E2: whatever happens to a run, it ends as if nothing had.

The reference is one uninterrupted run of 60 steps. Equal means: the same losses in metrics.jsonl, the same data_digest
per step, the same bytes in the last model.safetensors.
"""

import json
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch import clone, finish, interrupt, start, start_new, start_ranks, steps_done, wait_until
from tiny import steps_of, tiny_file, validations_of, weights_of

from faults.server import Drop, FaultServer, Slow, Status, every
from smolforge.checkpoint import commit
from smolforge.metrics_log import read_metrics
from smolforge.run import Run
from smolforge.tales.source import write

STEPS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exact")


def arguments(place: Path, run: Path, *more: str) -> list[str]:
    every = ["--set", "checkpoint.every=4", "--set", "evaluation.every=20", "--set", "samples.every=30"]
    return [tiny_file(place), "--out", str(run), "--steps", str(STEPS), *every, *more]


@pytest.fixture(scope="module")
def whole(place: Path) -> Run:
    """The run that nothing happened to."""
    run = Run(place / "whole")
    finish(start_new(arguments(place, run.path)))
    assert [step for step, _, _ in steps_of(run)] == list(range(1, STEPS + 1))
    return run


def assert_equal(run: Run, whole: Run) -> None:
    assert steps_of(run) == steps_of(whole)
    assert validations_of(run) == validations_of(whole)
    assert weights_of(run) == weights_of(whole)


def test_killed_eight_times(place: Path, whole: Run) -> None:
    run = Run(place / "killed")
    dice = random.Random(1)
    moments = [(dice.randint(1, 6), i % 2 == 1) for i in range(8)]
    times = interrupt(arguments(place, run.path), run, moments, dice, signal.SIGKILL)
    assert times == 8
    finish(start(arguments(place, run.path)))
    assert_equal(run, whole)


def test_terminated_and_interrupted(place: Path, whole: Run) -> None:
    run = Run(place / "terminated")
    words = arguments(place, run.path)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)):
        process = start(words)
        begin = steps_done(run)
        assert wait_until(lambda: steps_done(run) >= begin + 5, process)  # noqa: B023
        process.send_signal(number)
        output = finish(process, code)
        assert f"smolforge train --out {run.path}" in output.replace("\n", "")
    # What was done is saved: not one step is trained twice.
    assert [row["step"] for row in read_metrics(run) if row.get("event") == "resume"] == sorted(
        {row["step"] for row in read_metrics(run) if row.get("event") == "resume"}
    )
    finish(start(words))
    assert_equal(run, whole)


def test_a_full_disk(place: Path, whole: Run) -> None:
    run = Run(place / "full" / "run")
    run.path.parent.mkdir()
    words = arguments(place, run.path, "--set", "checkpoint.keep=20")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(run.path.parent)], capture_output=True, check=False
    )
    try:
        if mounted.returncode == 0:
            output = finish(start(words), 1)
            subprocess.run(["mount", "-o", "remount,size=64m", str(run.path.parent)], check=True)
        else:  # no right to mount: a limit on the size of files starves it as well
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
            process = start(words)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            output = finish(process, 1)
        assert "no room on the disk" in output and "Traceback" not in output
        finish(start(words))
        assert_equal(run, whole)
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(run.path.parent)], check=True)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_server_that_drops_every_third_request(place: Path, workers: int) -> None:
    shard = place / f"served-{workers}.parquet"
    write(shard, kind="parquet", documents=range(600), row_group_size=40)
    options = ["--set", f"data.workers={workers}", "--set", "data.cache=0"]
    with FaultServer() as server:
        server.files["shard.parquet"] = shard.read_bytes()
        words = arguments(place, place / f"calm-{workers}", "--data", server.url("shard.parquet"), *options)
        finish(start(words))
        server.fault = every(3, Drop(after=500))
        run = Run(place / f"dropped-{workers}")
        words = arguments(place, run.path, "--data", server.url("shard.parquet"), *options)
        interrupt(words, run, [(7, False), (9, True)], random.Random(2), signal.SIGKILL)
        finish(start(words))
    assert_equal(run, Run(place / f"calm-{workers}"))


def test_a_network_that_stays_away_saves_and_stops(place: Path) -> None:
    shard = place / "away.parquet"
    write(shard, kind="parquet", documents=range(200), row_group_size=2)
    with FaultServer() as server:
        server.files["shard.parquet"] = shard.read_bytes()
        options = ["--data", server.url("shard.parquet"), "--set", "data.cache=0", "--set", "data.read_ahead=1MB"]
        finish(start(arguments(place, place / "calm", *options)))
        run = Run(place / "away")
        words = arguments(place, run.path, *options, "--set", "data.patience=1")
        server.fault = lambda request: Status(503) if steps_done(run) >= 10 else None
        output = finish(start(words), 75)
        assert "503" in output and "Traceback" not in output
        done = steps_done(run)
        assert 0 < done < STEPS and commit.steps(run.checkpoints_path)[-1] == done
        # A signal is heard while the network is silent: before anything is open, and while waiting for a batch.
        slow, begun = Slow(pause=5.0, chunk=10), len(read_metrics(run))
        for silent in (lambda: True, lambda: len(read_metrics(run)) > begun):
            asked = len(server.requests)
            server.fault = lambda request: slow if request.method == "GET" and silent() else None  # noqa: B023
            process = start([*words, "--set", "data.patience=900"])
            assert wait_until(lambda: silent() and len(server.requests) > asked, process)  # noqa: B023
            process.send_signal(signal.SIGTERM)
            finish(process, 143)
        server.fault = None
        finish(start(words))
    assert_equal(run, Run(place / "calm"))


def test_a_signal_while_compiling(place: Path) -> None:
    run = Run(place / "compiling")
    words = [tiny_file(place), "--out", str(run.path), "--steps", "500", "--set", "training.compile=on"]
    process = start_new(words)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("model:"):
            break
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    done = steps_done(run)
    assert commit.steps(run.checkpoints_path) == ([done] if done else [])


def test_workers_and_prefetch_are_not_part_of_the_address(place: Path, whole: Run) -> None:
    run = Run(place / "workers")
    finish(start(arguments(place, run.path, "--set", "data.workers=3", "--set", "data.prefetch=7")))
    assert_equal(run, whole)


def test_one_rank_two_ranks_one_rank(place: Path, whole: Run) -> None:
    run = train_on_other_ranks(place / "ranks", arguments(place, place / "ranks"))
    assert_close(run, whole)
    assert {row["ranks"] for row in read_metrics(run) if row.get("event") == "resume"} == {1, 2}


@pytest.mark.slow
def test_dropout_and_average_with_kills_and_on_other_ranks(place: Path) -> None:
    options = ["--set", "training.dropout=0.2", "--set", "training.ema=8"]
    calm, killed = Run(place / "dropping"), Run(place / "dropping-killed")
    finish(start(arguments(place, calm.path, *options)))
    words = arguments(place, killed.path, *options)
    dice = random.Random(3)
    interrupt(words, killed, [(dice.randint(1, 6), i % 2 == 1) for i in range(4)], dice, signal.SIGKILL)
    finish(start(words))
    assert_equal(killed, calm)
    assert averages_of(killed) == averages_of(calm)
    place = place / "dropping-ranks"
    ranks = train_on_other_ranks(place, arguments(place.parent, place, *options))
    assert_close(ranks, calm)
    for ours, theirs in zip(averages_of(ranks), averages_of(calm), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def averages_of(run: Run) -> list[float]:
    return [row["average"]["loss"] for row in read_metrics(run) if "average" in row]


def train_on_other_ranks(out: Path, words: list[str]) -> Run:
    """A run that one process begins, two continue and one ends."""
    run = Run(out)
    for world, until in ((1, 20), (2, 40), (1, STEPS)):
        length = [*words[: words.index("--steps")], "--steps", str(STEPS), *words[words.index("--steps") + 2 :]]
        processes = start_ranks(length, world)
        if until < STEPS:
            assert wait_until(lambda: steps_done(run) >= until, processes[0])  # noqa: B023
            for process in processes:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            finish(process, 0 if until == STEPS else 143)
    return run


def assert_close(run: Run, whole: Run) -> None:
    """The same data, and losses that differ by what the order of sums changes."""
    ours, theirs = steps_of(run), steps_of(whole)
    assert [(s, d) for s, _, d in ours] == [(s, d) for s, _, d in theirs]
    assert max(abs(a - b) for (_, a, _), (_, b, _) in zip(ours, theirs, strict=True)) < 1e-6


def test_two_processes_do_not_share_a_run(place: Path, whole: Run) -> None:
    run = clone(whole, place / "locked")
    words = [*arguments(place, run.path), "--steps", "5000"]
    words = [w for i, w in enumerate(words) if not (w == "--steps" and i < len(words) - 2)]
    words.remove(str(STEPS))
    first = start(words)
    assert wait_until(lambda: steps_done(run) > STEPS, first)
    output = finish(start(words), 2)
    assert str(first.pid) in output
    first.send_signal(signal.SIGTERM)
    finish(first, 143)


def test_a_second_signal_leaves_at_once(place: Path, whole: Run) -> None:
    run = clone(whole, place / "hasty")
    process = start([tiny_file(place), "--out", str(run.path), "--steps", "+100000", "--set", "evaluation.every=1"])
    assert wait_until(lambda: steps_done(run) > STEPS, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    checked = subprocess.run(
        [sys.executable, "-m", "smolforge", "verify", str(run.path), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(checked.stdout)["newest_whole"]


def test_a_time_limit_saves_and_stops(place: Path) -> None:
    run = Run(place / "limited")
    words = [tiny_file(place), "--out", str(run.path), "--steps", "100000", "--time-limit", "8"]
    output = finish(start(words), 143)
    assert "time limit" in output
    done = steps_done(run)
    assert (run.checkpoints_path / "last").resolve().name == f"step-{done:08d}"
