"""A run on disk: logs that survive a kill, a lock that does not, and places that belong to something else."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.errors import BadInput, CheckpointError, RunFailed, RunLocked
from smolforge.files import read_json_lines, write_atomically
from smolforge.metrics_log import MetricsLog, read_metrics
from smolforge.run import Run, lock_run


def test_the_paths(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    names = {
        "config": "config.yaml", "index": "data_index.json", "metrics": "metrics.jsonl", "samples": "samples.jsonl",
        "tensorboard": "tensorboard", "report": "report.html", "checkpoints": "checkpoints", "lock": "lock",
    }  # fmt: skip
    assert {name: getattr(run, f"{name}_path") for name in names} == {n: tmp_path / "r" / f for n, f in names.items()}
    assert not (tmp_path / "r").exists()


def test_config_and_index(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    assert not run.exists and run.read_index() is None
    run.prepare()
    run.config_path.write_text("model: {}\n")
    run.write_index({"hash": "é", "shards": [1, 2]})
    assert run.exists
    assert run.config_path.read_text() == "model: {}\n"
    assert run.read_index() == {"hash": "é", "shards": [1, 2]}
    for damaged in ("{", "[]", "[" * 100_000):
        run.index_path.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"data_index\.json"):
            run.read_index()


@pytest.mark.parametrize("files", [[], [".DS_Store"], ["lock"], ["config.yaml", "anything"]])
def test_places_that_may_be_used(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).touch()
    Run(tmp_path).prepare()
    assert Run(tmp_path).checkpoints_path.is_dir()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["thesis.tex"], "not a run of smolforge"),
        (["config.json", "model.safetensors"], "a model directory"),
        (["checkpoints/epoch-1.ckpt"], "not a run of smolforge"),
        ([f"file{i}" for i in range(9)], r"file4, \.\.\."),
    ],
)
def test_places_of_something_else_are_refused_untouched(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=words) as caught:
        Run(tmp_path).prepare()
    assert caught.value.field == "out"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_in_the_place_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "r").touch()
    with pytest.raises(BadInput, match="is a file"):
        Run(tmp_path / "r").prepare()
    with pytest.raises(BadInput, match="cannot make"):
        Run(tmp_path / "r" / "below").prepare()


# ---- logs ------------------------------------------------------------------------------------------------------


def test_rows_come_back_and_non_finite_numbers_are_null(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with closing(MetricsLog(run.metrics_path)) as log:
        log.append({"step": 1, "loss": 0.1 + 0.2, "nested": {"x": [math.nan, 1.5]}})
        log.append({"step": 2, "loss": math.inf, "text": "é\n\u2028🙂"})
    rows = read_metrics(run)
    assert rows == read_metrics(str(tmp_path)) == [
        {"step": 1, "loss": 0.1 + 0.2, "nested": {"x": [None, 1.5]}},
        {"step": 2, "loss": None, "text": "é\n\u2028🙂"},
    ]  # fmt: skip
    assert list(read_json_lines(run.samples_path)) == []


def test_a_torn_line_is_cut_and_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsLog(path)) as log:
        log.append({"step": 1})
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert list(read_json_lines(path)) == [{"step": 1}], "a reader passes it over"
    with closing(MetricsLog(path)) as log:
        assert path.read_bytes() == whole
        log.append({"step": 2})
    assert list(read_json_lines(path)) == [{"step": 1}, {"step": 2}]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(1, 9), max_size=12).map(sorted),
    torn=st.integers(0, 40),
    back=st.integers(0, 9),
)
def test_cut_anywhere_then_resumed_equals_uninterrupted(
    tmp_path_factory: Any, steps: list[int], torn: int, back: int
) -> None:
    """The law of resuming: kill at any byte, take back the rows after the checkpoint, write them again."""
    folder = tmp_path_factory.mktemp("log")
    rows = [{"step": step, "loss": i / 7} for i, step in enumerate(steps)]
    with closing(MetricsLog(folder / "whole")) as log:
        for row in rows:
            log.append(row)
    whole = (folder / "whole").read_bytes()
    cut = whole[: max(0, len(whole) - torn)]
    (folder / "cut").write_bytes(cut)
    # The checkpoint is of a step whose rows were all written before the kill.
    lost = [row["step"] for row in rows[cut.count(b"\n") :]]
    resumed = min([back, *(step - 1 for step in lost)])
    with closing(MetricsLog(folder / "cut")) as log:
        log.truncate_after(resumed)
        for row in rows:
            if row["step"] > resumed:
                log.append(row)
    assert (folder / "cut").read_bytes() == whole


def test_taking_rows_back_counts_them_and_drops_unreadable_ones(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n{"event": "start"}\nnot json\n{"step": 5}\n{"step": 2')
    with closing(MetricsLog(path)) as log:
        assert log.truncate_after(9) == 1  # the one that is no JSON
        assert log.truncate_after(1) == 1
        log.append({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"event": "start"}\n{"step": 2}\n'


APPENDING = """
import sys
from contextlib import closing
from pathlib import Path
from smolforge.metrics_log import MetricsLog
with closing(MetricsLog(Path(sys.argv[1]))) as log:
    print("ready", flush=True)
    for step in range(10**9):
        log.append({"step": step, "loss": step / 3, "text": "x" * (step % 700)})
"""


def test_kill_9_while_logging_leaves_whole_rows(tmp_path: Path) -> None:
    generator, path = random.Random(2), tmp_path / "metrics.jsonl"
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", APPENDING, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0.02, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        rows = list(read_json_lines(path))
        assert len(rows) > 1
        assert [row["step"] for row in rows] == list(range(len(rows)))
        with closing(MetricsLog(path)) as log:
            log.truncate_after(-1)
        assert path.read_bytes() == b""


def test_a_full_disk_leaves_the_rows_before_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    real = os.write

    def nearly_full(descriptor: int, data: bytes) -> int:
        if len(data) > 20:
            return real(descriptor, data[:20])  # a part still fits
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(MetricsLog(path)) as log:
        log.append({"step": 1})
        monkeypatch.setattr(os, "write", nearly_full)
        with pytest.raises(RunFailed, match=r"no room on the disk for .* bytes are needed"):
            log.append({"step": 2, "text": "a" * 10})
        monkeypatch.undo()
        assert path.read_bytes() == b'{"step": 1}\n'
        log.append({"step": 2})
    assert len(list(read_json_lines(path))) == 2


def test_atomic_writing_keeps_the_old_file_on_any_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFailed, match="no room"):
        write_atomically(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == "old"


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(BadInput, match="is not a file"):
            write_atomically(place, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"] and not (tmp_path / "pipe").is_file()


# ---- the lock --------------------------------------------------------------------------------------------------

HOLDING = """
import sys, time
from smolforge.run import Run, lock_run
with lock_run(Run(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_has_the_run(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(RunLocked) as caught, lock_run(Run(tmp_path)):
        pass
    assert f"process {child.pid} on {os.uname().nodename}" in str(caught.value)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with lock_run(Run(tmp_path)):  # the kernel let go
        assert f"process {os.getpid()}" in Run(tmp_path).lock_path.read_text()


def test_a_lock_is_let_go_and_can_be_taken_again(tmp_path: Path) -> None:
    with lock_run(Run(tmp_path)):
        with pytest.raises(RunLocked), lock_run(Run(tmp_path)):
            pass
        with pytest.raises(RunLocked), lock_run(Run(tmp_path)):  # the refused one did not let it go
            pass
    with lock_run(Run(tmp_path)):
        pass


def test_a_forked_child_does_not_keep_a_released_run(tmp_path: Path) -> None:
    lock = lock_run(Run(tmp_path))
    lock.__enter__()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        lock.__exit__(None, None, None)
        with lock_run(Run(tmp_path)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_filesystem_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock_run(Run(tmp_path)):
        pass
    assert "no locks" in caplog.text


def test_strict_json_in_the_log(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path / "m")) as log:
        log.append({"step": 1, "loss": math.nan})
    json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
