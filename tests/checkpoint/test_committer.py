"""Saving in a thread: what is saved is the state of the moment, and no failure is lost."""

from __future__ import annotations

import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smolforge.checkpoint.background import Committer, snapshot, tree_bytes
from smolforge.checkpoint.commit import steps, verify
from smolforge.checkpoint.state import load_state, save_state
from smolforge.errors import RunFailed


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    state, gate = {"x": torch.zeros(1000)}, threading.Event()

    def write(directory: Path, tree: Any) -> None:
        gate.wait(10)
        save_state(directory, tree)

    with Committer(tmp_path) as committer:
        committer.save(1, state, write)
        assert committer.busy and steps(tmp_path) == []
        state["x"].fill_(1)  # training goes on
        gate.set()
    assert load_state(tmp_path / "step-00000001")["x"].sum() == 0
    assert verify(tmp_path / "step-00000001") == []
    assert committer.last == tmp_path / "step-00000001"


def test_one_save_is_in_flight(tmp_path: Path) -> None:
    running: list[int] = []
    most = 0

    def write(directory: Path, tree: Any) -> None:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        save_state(directory, tree)
        running.pop()

    after: list[str] = []
    with Committer(tmp_path, after=lambda path: after.append(path.name)) as committer:
        for step in range(1, 6):
            committer.save(step, {"x": torch.ones(3)}, write)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert most == 1
    assert after == [f"step-0000000{step}" for step in range(1, 6)]


@pytest.mark.parametrize("call", ["poll", "wait", "save"])
def test_a_failure_is_raised_once_at_the_next_call(tmp_path: Path, call: str) -> None:
    def broken(directory: Path, tree: Any) -> None:
        raise RunFailed("no room on the disk")

    committer = Committer(tmp_path)
    committer.save(1, {}, broken)
    assert committer._saving is not None
    futures.wait([committer._saving])
    with pytest.raises(RunFailed, match="no room"):
        committer.save(2, {}, save_state) if call == "save" else getattr(committer, call)()
    assert steps(tmp_path) == []
    committer.save(3, {}, save_state)
    committer.wait()
    assert steps(tmp_path) == [3]


def test_poll_does_not_wait(tmp_path: Path) -> None:
    gate = threading.Event()
    with Committer(tmp_path) as committer:
        committer.save(1, {}, lambda directory, tree: (gate.wait(10), save_state(directory, tree))[1])
        committer.poll()
        assert committer.busy
        gate.set()


def test_synchronous_saving_is_done_at_return(tmp_path: Path) -> None:
    committer = Committer(tmp_path, asynchronous=False)
    committer.save(1, {"x": torch.ones(2)}, save_state)
    assert steps(tmp_path) == [1]

    def broken(directory: Path, tree: Any) -> None:
        raise RunFailed("no room")

    with pytest.raises(RunFailed):
        committer.save(2, {}, broken)


def test_the_first_error_wins_on_the_way_out(tmp_path: Path) -> None:
    def broken(directory: Path, tree: Any) -> None:
        raise RunFailed("second")

    with pytest.raises(KeyboardInterrupt), Committer(tmp_path) as committer:
        committer.save(1, {}, broken)
        raise KeyboardInterrupt


def test_too_little_room_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolforge.checkpoint.commit.free_bytes", lambda directory: 10)
    with pytest.raises(RunFailed, match="no earlier checkpoint"), Committer(tmp_path) as committer:
        committer.save(1, {"x": torch.zeros(4)}, save_state)
    assert list(tmp_path.iterdir()) == []


def test_snapshots_own_their_memory_and_keep_what_is_shared() -> None:
    base = torch.arange(6.0)
    tree = {"a": base, "b": base, "t": (base.view(2, 3), [base[1:]]), "n": np.ones(2), "k": 3, "e": torch.empty(0)}
    copy = snapshot(tree)
    base.zero_()
    tree["n"][:] = 0
    assert copy["a"] is copy["b"]
    assert copy["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copy["t"][0].tolist() == [[0, 1, 2], [3, 4, 5]] and copy["t"][1][0].tolist() == [1, 2, 3, 4, 5]
    assert copy["n"].tolist() == [1, 1] and copy["k"] == 3
    assert isinstance(copy["t"], tuple)


def test_a_snapshot_holds_no_graph() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    copy = snapshot({"p": parameter, "grad": parameter * 2})
    assert not copy["p"].requires_grad and copy["grad"].grad_fn is None


def test_tree_bytes_counts_each_tensor_once() -> None:
    x = torch.zeros(10)
    assert tree_bytes({"a": x, "b": [x, torch.zeros(3, dtype=torch.int8)], "c": 5}) == 43
