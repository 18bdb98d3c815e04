"""What launchers do to the processes of a run: signals to all or to one, restarts, silence, and other directories."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launch import ENVIRONMENT, children_of, finish, start_ranks, steps_done, wait_until
from tiny import steps_of, tiny_file

from smolforge import distributed
from smolforge.checkpoint import commit
from smolforge.distributed import DistributedContext, init_distributed, interface_to
from smolforge.errors import BadInput
from smolforge.run import Run
from smolforge.training import shutdown
from smolforge.training.shutdown import GracefulShutdown

LONG = ["--steps", "100000", "--set", "checkpoint.every=100000", "--set", "evaluation.every=100000",
        "--set", "samples.every=100000"]  # fmt: skip
SHORT_TIMEOUT = "from datetime import timedelta\nfrom smolforge import distributed\n"
SHORT_TIMEOUT += "distributed.STEP_TIMEOUT = timedelta(seconds=4)\n"


def torchrun(place: Path, run: Run, *options: str, first: str = "", words: list[str] = LONG) -> subprocess.Popen[str]:
    """The run on two processes under torchrun; each runs the code `first` before."""
    program = place / "program.py"
    program.write_text(f"{first}\nfrom smolforge.cli import main\nmain()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return subprocess.Popen(
        [*command, str(program), "train", tiny_file(place), "--out", str(run.path), *words],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def assert_saved_where_it_stood(run: Run) -> None:
    assert commit.steps(run.checkpoints_path)[-1] == steps_done(run) >= 5


def test_the_interface_of_the_route() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no.such.host.invalid") is None


def test_an_environment_that_names_no_master(monkeypatch) -> None:
    import torch

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(BadInput, match="RANK is not set"):
        init_distributed(torch.device("cpu"))


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "STORE_SECONDS", 0.1)
    cut = threading.Event()

    class Store:
        def add(self, key: str, count: int) -> int:
            cut.wait()
            return 2

    assert DistributedContext(rank=1, world_size=2, store=Store()).is_first("error", "lost")
    cut.set()
    monkeypatch.setattr(distributed, "STORE_SECONDS", 60.0)
    assert not DistributedContext(rank=1, world_size=2, store=Store()).is_first("error", "lost")


@pytest.mark.parametrize("launched", [True, False])
def test_a_signal_that_comes_twice_is_one_under_a_launcher(monkeypatch, launched) -> None:
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if not launched:
        monkeypatch.delenv("WORLD_SIZE")
    with GracefulShutdown() as stop:
        stop.immediate = False
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested() and ended == ([] if launched else [143])
        monkeypatch.setattr(shutdown, "REPEATED_SECONDS", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert ended[-1:] == [143]


def test_one_process_is_terminated_and_all_save_and_stop(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    ranks = start_ranks([tiny_file(tmp_path), "--out", str(run.path), *LONG], 2)
    assert wait_until(lambda: steps_done(run) >= 5, ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [finish(process, 143) for process in ranks]
    assert "another process was asked to stop" in outputs[0]
    assert_saved_where_it_stood(run)


FAILS = """
import os
from smolforge.evaluation import loss as evaluation
from smolforge.training import checkpointing, metrics, train
from smolforge.training import step as steps
import torch
rank, at = os.environ["RANK"], [0]
step = train.Trainer._step
def counted(self, batch):
    at[0] = self.position.step
    step(self, batch)
def fails(place, name, when):
    inner = getattr(place, name)
    def outer(*args, **options):
        if rank == "{rank}" and at[0] >= when:
            raise ZeroDivisionError("a bug")
        return inner(*args, **options)
    setattr(place, name, outer)
train.Trainer._step = counted
fails({place}, {name!r}, {when})
"""


@pytest.mark.parametrize(
    ("rank", "place", "name", "when", "saved"),
    [
        (1, "steps.CausalLM", "loss", 7, 7),  # forward
        *(
            pytest.param(*words, marks=pytest.mark.slow)
            for words in (
                (1, "torch.Tensor", "backward", 7, 7),  # before the first sum over the processes
                (0, "train", "to_device", 7, 7),  # before it
                (1, "train.Loader", "__next__", 7, 8),  # the batch after the next step
                (0, "metrics.MetricsLogger", "_row", 7, 8),  # metrics of a step
                (1, "evaluation.EvalSlice", "windows", 9, 10),  # validation, where one rank does its share
                (0, "metrics.Engine", "from_model", 9, 10),  # samples
                (0, "checkpointing", "save_state", 9, 5),  # the save itself
            )
        ),
    ],
)
def test_an_error_of_any_kind_on_one_process_saves_first(tmp_path: Path, rank, place, name, when, saved) -> None:
    run, first = Run(tmp_path / "run"), FAILS.format(rank=rank, place=place, name=name, when=when)
    words = [tiny_file(tmp_path), "--out", str(run.path), "--steps", "20"]
    outputs = [finish(process, 1) for process in start_ranks(words, 2, first=first)]
    assert "ZeroDivisionError: a bug" in outputs[rank]
    assert "error:" not in outputs[1 - rank] and "Traceback" not in outputs[1 - rank]  # reported once
    assert commit.steps(run.checkpoints_path)[-1] == saved
    assert (f"step {saved} was saved before the error" in outputs[0]) == (saved not in (5, 10))


FAILS_AMID_SUMS = """
import os
from functools import partialmethod
from torch.nn.parallel import DistributedDataParallel
from smolforge.training import step as steps, train
start = DistributedDataParallel.__init__
DistributedDataParallel.__init__ = partialmethod(start, bucket_cap_mb=0.01)  # several sums
step, complete = train.Trainer._step, steps._Sums.complete
def failing_step(self, batch):
    if os.environ["RANK"] == "1" and self.position.step == 7:
        first = next(value for name, value in self.context.model.named_parameters() if "layers.0" in name)
        first.register_hook(lambda gradient: 1 / 0)
    step(self, batch)
def counting(self):
    print(f"summed: {self.started} of {len(self.buckets)}")
    complete(self)
train.Trainer._step, steps._Sums.complete = failing_step, counting
"""


def test_an_error_amid_the_sums_of_gradients_saves_first(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    words = [tiny_file(tmp_path), "--out", str(run.path), "--steps", "20", "--set", "training.micro_batch=4"]
    outputs = [finish(process, 1) for process in start_ranks(words, 2, first=FAILS_AMID_SUMS)]
    assert "ZeroDivisionError" in outputs[1] and "Traceback" not in outputs[0]
    found = re.search(r"summed: (\d+) of (\d+)", outputs[1])
    assert found and 0 < int(found[1]) < int(found[2]), "the error came before or after all sums"
    assert commit.steps(run.checkpoints_path)[-1] == 7 and "step 7 was saved before the error" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["all at once", "torchrun", "torchrun dies"])
def test_signals_of_a_scheduler(tmp_path: Path, whom: str) -> None:
    run = Run(tmp_path / "run")
    process = torchrun(tmp_path, run)
    assert wait_until(lambda: steps_done(run) >= 5, process)
    workers = children_of(process.pid)
    assert len(workers) == 2
    for pid in [*workers, process.pid] if whom == "all at once" else [process.pid]:
        os.kill(pid, signal.SIGUSR1 if whom == "torchrun dies" else signal.SIGTERM)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker trains on"
        time.sleep(0.1)
    assert_saved_where_it_stood(run)


@pytest.mark.slow
def test_a_failed_attempt_is_started_again(tmp_path: Path) -> None:
    first = """
import os, sys, time
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if rank == 0:
    time.sleep(1.5)  # comes later than the others, as the one that verifies checkpoints would
from smolforge.training.train import Trainer
step = Trainer._step
def fails(self, batch):
    if attempt < 2 and rank == 1 and self.position.step == 6 + 5 * attempt:
        os._exit(7)
    step(self, batch)
Trainer._step = fails
"""
    run = Run(tmp_path / "run")
    finish(torchrun(tmp_path, run, "--max-restarts", "2", first=first, words=["--steps", "20"]))
    assert [step for step, _, _ in steps_of(run)] == list(range(1, 21))


@pytest.mark.slow
def test_a_frozen_process_is_given_up(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    ranks = start_ranks([tiny_file(tmp_path), "--out", str(run.path), *LONG], 2, first=SHORT_TIMEOUT)
    try:
        assert wait_until(lambda: steps_done(run) >= 5, ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        output = finish(ranks[0], 1)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert "another process ended or was silent for too long" in output and "Traceback" not in output


@pytest.mark.slow
def test_who_waits_for_data_or_for_the_disk_is_not_given_up(tmp_path: Path) -> None:
    first = (
        SHORT_TIMEOUT
        + """
import os, time
from smolforge.data import Loader
from smolforge.training import checkpointing, train
train.WAITING_SECONDS = 1.0
wait, write, rank = Loader.wait, checkpointing.save_state, os.environ["RANK"]
began = time.monotonic()
def slow_wait(self, seconds):
    time.sleep(0.2)
    slow = rank == "1" and self_steps[0] == 8 and time.monotonic() - at_eight[0] < 7
    return False if slow else wait(self, seconds)
self_steps, at_eight, step = [0], [0.0], train.Trainer._step
def counted(self, batch):
    step(self, batch)
    self_steps[0] = self.position.step
    at_eight[0] = time.monotonic()
def slow_write(*args, **options):
    time.sleep(7)
    write(*args, **options)
train.Trainer._step, Loader.wait, checkpointing.save_state = counted, slow_wait, slow_write
"""
    )
    run = Run(tmp_path / "run")
    words = [tiny_file(tmp_path), "--out", str(run.path), "--steps", "12", "--set", "checkpoint.every=6"]
    for process in start_ranks(words, 2, first=first):
        finish(process)
    assert steps_done(run) == 12 and commit.steps(run.checkpoints_path) == [6, 12]


@pytest.mark.slow
def test_machines_without_a_shared_directory_are_told(tmp_path: Path) -> None:
    first = f"""
import os
from smolforge.training import ranks
ranks.SHARED_SECONDS = 1.0
os.chdir(os.path.join({str(tmp_path)!r}, os.environ["RANK"]))
"""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    processes = start_ranks([tiny_file(tmp_path), "--out", "run", "--steps", "5"], 2, first=first)
    output = "".join([finish(process, 2) for process in processes])
    assert output.count("process 1 does not see the directory run of process 0") == 1, "one of them reports it"
    assert "Traceback" not in output
