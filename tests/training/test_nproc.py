"""`--nproc`, `srun` and several GPUs: how many processes a run gets, one message of all, and the run's exit code."""

import json
import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import children_of, finish, start, steps_done, wait_until
from tiny import tiny_file

from smolforge.checkpoint import commit
from smolforge.distributed import DistributedContext
from smolforge.errors import BadInput, RunFailed
from smolforge.metrics_log import read_metrics
from smolforge.run import Run
from smolforge.slurm import first_host, read_slurm
from smolforge.training import launch
from smolforge.training.setup import TrainRequest

LONG = ["--steps", "100000", "--set", "checkpoint.every=100000", "--set", "evaluation.every=100000",
        "--set", "samples.every=100000", "--nproc", "2"]  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({}, 0), ({0: 143, 1: 143}, 143), ({0: 130, 1: 130}, 130), ({0: 130, 1: 143}, 130), ({0: 1, 1: 143}, 1),
        ({0: 1, 1: 75}, 75), ({0: 143, 1: 2}, 2), ({0: -15, 1: 143}, 143), ({0: -9, 1: 2}, 2),
    ],
)  # fmt: skip
def test_the_exit_code_of_a_run(codes: dict[int, int], expected: int) -> None:
    assert launch.exit_code(codes) == expected


def test_a_process_that_was_killed_is_named() -> None:
    with pytest.raises(RunFailed, match="process 1 was killed by SIGKILL"):
        launch.exit_code({0: 1, 1: -9})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("a-[007-009,12],b1", "a-007"), ("login1,gpu[1-3]", "login1"), ("n[3]x[1-2]", "n3x1")],
)
def test_the_first_host_of_slurm(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_tasks_of_srun() -> None:
    task = {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_NTASKS": "7", "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_NODELIST": "gpu[07-10]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "CUDA_VISIBLE_DEVICES": "0,1",
    }  # fmt: skip
    found = dict(task)
    read_slurm(found)
    port = found.pop("MASTER_PORT")
    assert 1024 < int(port) < 32768
    assert {k: v for k, v in found.items() if k not in task} == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07",
    }  # fmt: skip
    own = task | {"CUDA_VISIBLE_DEVICES": "1", "MASTER_ADDR": "10.0.0.1"}
    read_slurm(own)
    assert own["LOCAL_RANK"] == "0" and own["MASTER_ADDR"] == "10.0.0.1" and own["MASTER_PORT"] == port
    for alone in (
        {k: v for k, v in task.items() if "STEP" not in k},  # a script of sbatch, without srun
        task | {"SLURM_STEP_NUM_TASKS": "1"},
        task | {"RANK": "3"},  # torchrun under srun
    ):
        before = dict(alone)
        read_slurm(alone)
        assert alone == before


@pytest.fixture
def gpus(monkeypatch):
    """A machine with eight GPUs, whose processes are counted instead of started."""
    for name in ("WORLD_SIZE", "SMOLFORGE_DEVICE", launch.STARTED_BY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(launch, "start_processes", lambda count, words: count)
    return monkeypatch


@pytest.mark.parametrize(
    ("sequences", "asked", "count"),
    [(8, None, 8), (64, "auto", 8), (4, None, 4), (12, None, 6), (1, None, None), (8, "3", 3), (8, "1", None)],
)
def test_all_gpus_are_used_and_said(gpus, caplog, tmp_path, sequences, asked, count) -> None:
    caplog.set_level(logging.INFO)
    request = TrainRequest(tiny_file(tmp_path), [f"training.tokens_per_step={32 * sequences}"], out=tmp_path / "run")
    assert launch.launch(request, asked, []) == count
    assert (f"processes: {count}" in caplog.text) == (asked in (None, "auto") and count is not None)


def test_one_gpu_by_its_number_and_wrong_numbers(gpus, tmp_path) -> None:
    request = TrainRequest(tiny_file(tmp_path), out=tmp_path / "run")
    with pytest.raises(BadInput, match="'many' is not a number of processes"):
        launch.launch(request, "many", [])
    gpus.setenv("SMOLFORGE_DEVICE", "cuda:3")
    assert launch.launch(request, None, []) is None
    gpus.setenv("WORLD_SIZE", "2")
    assert launch.launch(request, None, []) is None
    with pytest.raises(BadInput, match="a launcher has started this process already"):
        launch.launch(request, "2", [])


def test_an_error_is_marked_where_another_rank_reports_it() -> None:
    class Store(dict):
        def add(self, key: str, amount: int) -> int:
            self[key] = self.get(key, 0) + amount
            return self[key]

    store = Store()
    ranks = [DistributedContext(rank, 3, store=store) for rank in range(3)]
    marks = []
    for rank, error in zip(ranks, (BadInput("x"), BadInput("x"), RuntimeError("[gloo] closed")), strict=True):
        with pytest.raises((BadInput, RunFailed)) as caught, rank.one_error():
            raise error
        marks.append(caught.value.is_reported)
    assert marks == [False, True, True]


def test_the_thread_of_the_rendezvous_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it prints an error at the end, where it happens to be the last that knows of itself."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    stopped: list[object] = []
    monkeypatch.setattr(DynamicRendezvousHandler, "shutdown", lambda self: stopped.append(self))
    monkeypatch.setattr(LocalElasticAgent, "run", lambda _: SimpleNamespace(failures={}))
    for name in (launch.STARTED_BY, "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "")
    assert launch.start_processes(2, ["train"]) == 0 and len(stopped) == 1


def test_bad_input_is_reported_once_with_its_own_code(tmp_path: Path) -> None:
    words = [tiny_file(tmp_path), "--out", str(tmp_path / "run"), "--nproc", "2", "--set", "optimizer.name=sgdd"]
    output = finish(start(words), 2)
    assert output.count("unknown optimizer 'sgdd'") == 1 and output.count("error:") == 1 and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_the_run(tmp_path: Path, number: int) -> None:
    run = Run(tmp_path / "run")
    process = start([tiny_file(tmp_path), "--out", str(run.path), *LONG])
    assert wait_until(lambda: steps_done(run) >= 5, process)
    process.send_signal(number)
    output = finish(process, 130 if number == signal.SIGINT else 143)
    assert commit.steps(run.checkpoints_path)[-1] == steps_done(run) >= 5
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    process = start([tiny_file(tmp_path), "--out", str(run.path), *LONG])
    assert wait_until(lambda: steps_done(run) >= 5, process)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    output = finish(process, 1)
    assert "process 1 was killed by SIGKILL" in output and "Traceback" not in output


@pytest.mark.slow
def test_one_object_of_json_and_the_same_command_continues(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    words = [tiny_file(tmp_path), "--out", str(run.path), "--nproc", "2", "--json"]
    for steps in (10, 20):
        process = start([*words, "--steps", str(steps)])
        lines = [line for line in finish(process).splitlines() if line.startswith("{")]
        assert len(lines) == 1 and json.loads(lines[0])["step"] == steps
    assert [row["ranks"] for row in read_metrics(run) if row.get("event") == "resume"] == [2]
