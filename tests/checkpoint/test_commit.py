"""Whole or not at all: kills, full disks, corruption, retention."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from smolforge.checkpoint import commit as commits
from smolforge.checkpoint.commit import commit, newest_whole, prune, read_manifest, steps, sweep, verify
from smolforge.checkpoint.locate import load_model, verify_tree
from smolforge.errors import CheckpointError, RunFailed


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_a_commit_is_listed_linked_and_whole(checkpoints: Path) -> None:
    assert steps(checkpoints) == [1, 2, 3]
    assert (checkpoints / "last").readlink() == Path("step-00000003")
    newest = checkpoints / "step-00000003"
    step, listed = read_manifest(newest)
    assert step == 3
    assert set(listed) == {path.relative_to(newest).as_posix() for path in files_of(newest)} - {"manifest.json"}
    assert {"training/state.json", "training/tensors.safetensors", "model.safetensors"} <= set(listed)
    assert all(verify(checkpoints / f"step-0000000{i}") == [] for i in (1, 2, 3))
    assert {entry.name for entry in checkpoints.iterdir()} == {*(f"step-0000000{i}" for i in (1, 2, 3)), "last"}


def test_the_order_of_a_commit(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is synced, then the manifest is written and synced, then the rename, then its directory is."""
    events: list[str] = []
    real_sync, real_rename, paths = os.fsync, Path.rename, {}
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(str(Path(f"/proc/self/fd/{fd}").readlink())), real_sync(fd))[1]
    )
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, target: (events.append("RENAME"), paths.update(was=self), real_rename(self, target))[2],
    )
    done = commit(tmp_path / "c", 1, tiny.write)
    before, after = events[: events.index("RENAME")], events[events.index("RENAME") + 1 :]
    temporary = paths["was"]
    expected = {str(temporary / path.relative_to(done)) for path in files_of(done)}
    assert expected <= set(before)
    manifest = str(temporary / "manifest.json")
    assert before.index(manifest) > max(before.index(path) for path in expected - {manifest})
    assert {str(temporary), str(temporary / "training")} <= set(before)
    assert before[-1] == str(temporary)
    assert str(tmp_path / "c") in after


def test_a_failing_write_leaves_everything_as_it_was(checkpoints: Path) -> None:
    before = {path: path.read_bytes() for path in files_of(checkpoints)}

    def broken(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    for step in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            commit(checkpoints, step, broken)
    assert {path: path.read_bytes() for path in files_of(checkpoints)} == before


def test_a_step_is_replaced_safely(tiny: Any, checkpoints: Path) -> None:
    def other(directory: Path) -> None:
        tiny.write(directory)
        (directory / "README.md").write_text("second")

    commit(checkpoints, 3, other)
    assert (checkpoints / "step-00000003" / "README.md").read_text() == "second"
    assert verify(checkpoints / "step-00000003") == []
    assert not [entry for entry in checkpoints.iterdir() if entry.name.startswith(".")]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(checkpoints: Path) -> None:
    (checkpoints / "step-00000003").rename(checkpoints / ".old-step-00000003-abc")
    (checkpoints / ".tmp-step-00000003-def").mkdir()
    assert newest_whole(checkpoints) == checkpoints / ".old-step-00000003-abc"
    assert sweep(checkpoints) == [".tmp-step-00000003-def"]
    assert newest_whole(checkpoints) == checkpoints / "step-00000003"
    (checkpoints / ".old-step-00000003-abc").mkdir()
    assert sweep(checkpoints) == [".old-step-00000003-abc"]
    assert verify(checkpoints / "step-00000003") == []


def test_what_cannot_be_read_back_is_not_committed(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"\xff" * 100)

    with pytest.raises(RunFailed, match=r"model\.safetensors could not be read back"):
        commit(tmp_path, 1, write)
    assert steps(tmp_path) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_all_files_have_the_mode_of_the_umask(tiny: Any, tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors makes its files with mode 0600, so another user or container could not read a checkpoint."""
    before = os.umask(umask)
    try:
        directory = commit(tmp_path, 1, tiny.write)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files_of(directory)} == {
        path.name: oct(mode) for path in files_of(directory)
    }
    assert "model.safetensors" in {path.name for path in files_of(directory)}


# ---- damage ----------------------------------------------------------------------------------------------------


def test_each_file_flipped_cut_or_removed_is_named_and_the_previous_used(
    checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest, previous = checkpoints / "step-00000003", checkpoints / "step-00000002"
    pristine = tmp_path / "pristine"
    shutil.copytree(newest, pristine)
    for path in files_of(newest):
        data = path.read_bytes()
        name = path.relative_to(newest).as_posix()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        for damaged in (flipped, data[:-1], data[:middle], b"", data + b"\0", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            caplog.clear()
            assert newest_whole(checkpoints) == previous, (name, damaged is None)
            assert len(caplog.messages) == 1 and name in caplog.text and "step-00000003" in caplog.text
            assert any(name in problem for problem in verify(newest))
            if name.startswith("training/"):  # a model is used without it, so it is not even read
                assert load_model(newest)[2] == load_model(checkpoints.parent)[2] == newest
            else:
                with pytest.raises(CheckpointError, match="damaged") as caught:
                    load_model(newest)
                assert name in str(caught.value) and str(previous) in str(caught.value)
                assert load_model(checkpoints.parent)[2] == previous
            path.write_bytes(data)
    assert newest_whole(checkpoints) == newest


def test_200_random_corruptions_and_none_loads_silently(checkpoints: Path) -> None:
    generator = random.Random(20)
    newest = checkpoints / "step-00000003"
    files = files_of(newest)
    contents = {path: path.read_bytes() for path in files}
    for trial in range(200):
        path = generator.choice(files)
        data = bytearray(contents[path])
        kind = generator.choice(["bit", "byte", "cut", "zeros", "swap", "grow", "remove", "exchange"])
        place = generator.randrange(len(data))
        if kind == "bit":
            data[place] ^= 1 << generator.randrange(8)
        elif kind == "byte":
            data[place] = (data[place] + generator.randrange(1, 256)) % 256
        elif kind == "cut":
            del data[place:]
        elif kind == "zeros":
            data[place : place + 512] = bytes(len(data[place : place + 512]))
        elif kind == "swap":
            other = generator.randrange(len(data))
            data[place], data[other] = data[other], data[place]
        elif kind == "grow":
            data[place:place] = generator.randbytes(generator.randrange(1, 9))
        elif kind == "exchange":
            data = bytearray(contents[generator.choice(files)])
        if data == contents[path] and kind != "remove":
            continue
        path.unlink() if kind == "remove" else path.write_bytes(data)
        name = path.relative_to(newest).as_posix()
        assert any(name in problem for problem in verify(newest)), (trial, kind, name)
        assert newest_whole(checkpoints) == checkpoints / "step-00000002"
        if not name.startswith("training/"):
            with pytest.raises(CheckpointError):
                load_model(newest)
        report = verify_tree(checkpoints.parent)
        assert not report.whole
        assert report.newest_whole == str(checkpoints / "step-00000002")
        path.write_bytes(contents[path])
    assert verify(newest) == []


def test_a_checkpoint_under_another_steps_name_is_refused(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    (checkpoints / "step-00000002").rename(checkpoints / "step-00000009")
    assert newest_whole(checkpoints) == checkpoints / "step-00000003"
    assert "step 2" in caplog.text


def test_weights_that_the_manifest_does_not_know_are_a_problem(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000003"
    (newest / "notes.txt").write_text("mine")
    (newest / "pinned").touch()
    assert verify(newest) == []
    shutil.copy(newest / "model.safetensors", newest / "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors" in verify(newest)[0]


def test_nothing_whole_is_none(checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        (checkpoints / f"step-0000000{step}" / "manifest.json").unlink()
    assert newest_whole(checkpoints) is None
    assert len(caplog.messages) == 3
    assert newest_whole(tmp_path / "nowhere") is None


def test_verify_tree_reports(checkpoints: Path) -> None:
    report = verify_tree(checkpoints.parent)
    assert report.whole and len(report.checkpoints) == 3
    (checkpoints / "step-00000003" / "config.json").unlink()
    report = verify_tree(checkpoints.parent)
    text = "\n".join(report.lines())
    assert "DAMAGED" in text and "config.json: is missing" in text and "step-00000002" in text
    assert report.newest_whole == str(checkpoints / "step-00000002")
    assert [checked.step for checked in verify_tree(checkpoints / "step-00000003").checkpoints] == [3]
    with pytest.raises(CheckpointError, match="no checkpoints"):
        verify_tree(checkpoints / "step-00000002" / "training")


# ---- kills -----------------------------------------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
from smolforge.checkpoint.commit import commit, prune, steps

checkpoints = Path(sys.argv[1])

def write(directory):
    for name in ("a.bin", "b.bin", "training/c.bin"):
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(range(256)) * 400)

step = max(steps(checkpoints), default=0)
print("ready", flush=True)
while True:
    step += 1
    commit(checkpoints, step, write)
    commit(checkpoints, max(1, step - 1), write)  # a replacement, as after a rollback
    prune(checkpoints, keep=2)
    print(step, flush=True)
"""


def test_kill_9_at_random_instants_always_leaves_the_last_committed_checkpoint(tmp_path: Path) -> None:
    generator, reached = random.Random(5), 0
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        # Killed somewhere in the commits after one that is known to be done, however slow the machine is.
        reached = int(child.stdout.readline())
        time.sleep(generator.uniform(0.0, 0.1))
        child.send_signal(signal.SIGKILL)
        reached = max([reached, *(int(line) for line in child.stdout.read().split())])
        child.wait()
        newest = newest_whole(tmp_path)
        assert newest is not None and read_manifest(newest)[0] >= reached
        # Everything that counts as a checkpoint is whole: half-made ones never have the name.
        assert all(verify(tmp_path / commits.step_name(step)) == [] for step in steps(tmp_path))
    sweep(tmp_path)
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    assert newest_whole(tmp_path) is not None


# ---- a full disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 2 MiB, where the tests may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs needs root: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(size: int) -> Any:
    def write(directory: Path) -> None:
        from safetensors.torch import save_file

        (directory / "training").mkdir()
        save_file({"x": torch.zeros(size // 8)}, directory / "model.safetensors")
        save_file({"x": torch.zeros(size // 8)}, directory / "training" / "tensors.safetensors")

    return write


def assert_told(caught: Any, checkpoints: Path, step: int) -> None:
    text = str(caught.value)
    assert f"step {step}" in text
    assert "bytes are needed" in text and "are free" in text
    assert f"{checkpoints / 'step-00000001'}, is whole" in text
    assert steps(checkpoints) == [1]
    assert verify(checkpoints / "step-00000001") == []
    assert not [entry for entry in checkpoints.iterdir() if entry.name.startswith(".")], "room is given back"


@pytest.mark.parametrize("told_before", [True, False])
def test_a_small_disk_that_fills(small_disk: Path, told_before: bool) -> None:
    checkpoints = small_disk / "checkpoints"
    commit(checkpoints, 1, fill(1_200_000))
    with pytest.raises(RunFailed) as caught:
        commit(checkpoints, 2, fill(1_200_000), expected_bytes=1_200_000 if told_before else None)
    assert_told(caught, checkpoints, 2)
    commits.prune(checkpoints, keep=1)
    assert newest_whole(checkpoints) == checkpoints / "step-00000001"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5])
def test_the_disk_fills_while_syncing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, code: int) -> None:
    """Filesystems with delayed allocation report a full disk only at fsync; this runs everywhere."""
    commit(tmp_path, 1, fill(1000))
    real, count = os.fsync, 0

    def sync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(RunFailed) as caught:
        commit(tmp_path, 2, fill(1000))
    monkeypatch.undo()
    assert_told(caught, tmp_path, 2)


def test_a_disk_that_fills_after_the_rename_leaves_both_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tmp_path, 1, fill(1000))

    def sync(directory: Path) -> None:
        if directory == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commits, "sync_directory", sync)
    for step in (1, 2):  # a replacement and a new one
        with pytest.raises(RunFailed, match=f"step-0000000{step}, is whole"):
            commit(tmp_path, step, fill(2000))
    sweep(tmp_path)
    assert [verify(tmp_path / commits.step_name(step)) for step in steps(tmp_path)] == [[], []]


def test_another_error_of_the_disk_is_not_called_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="Input/output"):
        commit(tmp_path, 1, fill(1000))
    assert list(tmp_path.iterdir()) == []


# ---- retention -------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for step in range(10, 110, 10):
        commit(tmp_path, step, lambda directory: (directory / "x").write_text("x"))  # type: ignore[arg-type,return-value]
    return tmp_path


def test_prune_keeps_newest_every_nth_best_and_pinned(many: Path) -> None:
    for step in (20, 70):
        (many / f"step-{step:08d}" / "pinned").touch()
    removed = prune(many, keep=2, keep_every=50, best=30)
    assert steps(many) == [20, 30, 50, 70, 90, 100]
    assert removed == [10, 40, 60, 80]
    assert not [entry for entry in many.iterdir() if entry.name.startswith(".")]
    assert prune(many, keep=2, keep_every=50, best=30) == []


def test_prune_does_not_count_damaged_ones(many: Path) -> None:
    for step in (80, 90, 100):
        (many / f"step-{step:08d}" / "x").unlink()
    prune(many, keep=2)
    assert [step for step in steps(many) if verify(many / f"step-{step:08d}") == []] == [60, 70]
    assert prune(many, keep=0) == [60]


def test_prune_of_damaged_ones_alone_removes_nothing(many: Path) -> None:
    for directory in many.glob("step-*"):
        (directory / "manifest.json").write_text("{}")
    assert prune(many, keep=1) == []


def test_a_kill_in_the_middle_of_pruning_leaves_nothing_that_counts(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: Any) -> None:
        next(iter(Path(path).iterdir())).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(many, keep=1)
    assert steps(many) == list(range(20, 110, 10))
    assert all(verify(many / f"step-{step:08d}") == [] for step in steps(many))
    assert len(sweep(many)) == 1
