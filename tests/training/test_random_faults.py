"""Twenty faults in one run of two processes, in random order: it ends as the undisturbed run does.

Processes are killed in a step, in a save and while they start, frozen, and sent signals; so is what started them. No
try to train may last longer than `LIMIT`.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import launch
import pytest
import torch
from launch import Forked, children_of, finish, is_saving, start, start_ranks, steps_done, wait_until
from tiny import steps_of, tiny_file, validations_of

from smolforge.checkpoint.weights import read_weights
from smolforge.run import Run

LIMIT = 240.0  # seconds
STEPS = 400
# What comes, for whom, and when. A launcher is needed for what it is sent, and to end the others while they start.
FAULTS = [
    ("SIGKILL", "process", "step"), ("SIGKILL", "process", "save"), ("SIGKILL", "process", "start"),
    ("SIGKILL", "launcher", "step"), ("SIGSTOP", "process", "step"), ("SIGTERM", "process", "step"),
    ("SIGTERM", "all", "step"), ("SIGTERM", "launcher", "save"), ("SIGUSR1", "process", "save"),
    ("SIGUSR1", "launcher", "step"),
]  # fmt: skip
SHORT_TIMEOUT = """
from datetime import timedelta
from smolforge import distributed
distributed.STEP_TIMEOUT = timedelta(seconds=10)
"""


def begun(words: list[str], run: Run, when: str, dice: random.Random, *, launched: bool) -> list[Forked]:
    """The run at the moment of a fault: the processes, or their launcher."""
    processes = [start([*words, "--nproc", "2"])] if launched else start_ranks(words, 2, first=SHORT_TIMEOUT)
    goal = steps_done(run) + dice.randint(1, 10)
    if when == "start":
        came = wait_until(lambda: len(children_of(processes[0].pid)) == 2, processes[0])
        time.sleep(3 * dice.random())
    else:
        came = wait_until(lambda: steps_done(run) >= goal, processes[0])
        if when == "save":
            came = wait_until(lambda: is_saving(run), processes[0], interval=0)
        else:
            time.sleep(0.05 * dice.random())
    assert came, processes[0].communicate()[0][-3000:]
    return processes


def wait_for_the_end(processes: list[Forked], workers: list[int]) -> Iterator[tuple[int, str]]:
    """Exit codes and outputs, once none of the processes is left."""
    end = time.monotonic() + LIMIT
    for process in processes:
        output, _ = process.communicate(timeout=end - time.monotonic())
        assert process.returncode is not None
        yield process.returncode, output
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "a process trains on"
        time.sleep(0.05)


def disturb(words: list[str], run: Run, fault: tuple[str, str, str], dice: random.Random) -> None:
    """One try to train, with one fault."""
    name, whom, when = fault
    launched = whom in ("launcher", "all") or when == "start"
    processes = begun(words, run, when, dice, launched=launched)
    workers = children_of(processes[0].pid) if launched else [process.pid for process in processes]
    sent = {"process": [dice.choice(workers)], "launcher": [processes[0].pid], "all": [*workers, processes[0].pid]}
    for pid in sent[whom]:
        os.kill(pid, signal.Signals[name])
    hit = [process for process in processes if process.pid in sent[whom]]
    others = [process for process in processes if process not in hit]
    saved = name in ("SIGTERM", "SIGUSR1")
    for code, output in wait_for_the_end(processes if saved else others, workers if launched else []):
        assert code == (143 if saved else 1), f"{fault}: {code}\n{output[-3000:]}"
    for process in hit:  # it may be frozen
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_twenty_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: str) -> None:
    dice = random.Random(int(os.environ.get("SMOLFORGE_SOAK_SEED", "0")))

    def words_for(run: Run) -> list[str]:
        settings = [f"training.parallel={parallel}", "checkpoint.every=5", "checkpoint.keep=3", "evaluation.every=100",
                    "samples.every=200"]  # fmt: skip
        options = [word for setting in settings for word in ("--set", setting)]
        return [tiny_file(tmp_path), "--out", str(run.path), "--steps", str(STEPS), *options]

    run, whole = Run(tmp_path / "run"), Run(tmp_path / "whole")
    for fault in dice.sample(FAULTS * 2, 2 * len(FAULTS)):
        disturb(words_for(run), run, fault, dice)
    monkeypatch.setattr(launch, "PATIENCE", 1200.0)
    for each in (run, whole):
        for process in start_ranks(words_for(each), 2):
            finish(process)
    assert steps_of(run) == steps_of(whole) and validations_of(run) == validations_of(whole)
    ours, theirs = (read_weights(each.checkpoints_path / "last") for each in (run, whole))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
