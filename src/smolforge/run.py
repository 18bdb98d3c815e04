"""A run's directory: its paths, its configuration and data index, and the lock that keeps a second process out.

`metrics_log.py` has its logs.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolforge.errors import BadInput, RunLocked
from smolforge.files import read_json, write_atomically

logger = logging.getLogger(__name__)

MAX_INDEX_BYTES = 1 << 30
# What the operating system or an editor leaves behind; a directory that holds only these counts as empty.
_LITTER = {".DS_Store", "Thumbs.db", "lost+found", ".gitkeep"}


class Run:
    """The paths of one run. Making the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        """The whole resolved configuration."""
        self.index_path = self.path / "data_index.json"
        """Every shard and row group of the sources."""
        self.metrics_path = self.path / "metrics.jsonl"
        """One row per logged step, validation or event."""
        self.reference_path = self.path / "reference.json"
        """Log-probabilities of the answers of preferences, by the model that the run starts from."""
        self.samples_path = self.path / "samples.jsonl"
        """The fixed prompts' continuations through time."""
        self.tensorboard_path = self.path / "tensorboard"
        """The directory of TensorBoard's event files."""
        self.report_path = self.path / "report.html"
        """The self-contained page."""
        self.checkpoints_path = self.path / "checkpoints"
        """The directory of step-00000000 directories."""
        self.average_path = self.path / "average"
        """The averaged weights, while they predict held-out text best: a directory like that of checkpoints."""
        self.frames_path = self.path / "frames"
        """The directory of early models for the time-lapse, named as checkpoints are."""
        self.lock_path = self.path / "lock"
        """The file that `lock_run` locks."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config_path.is_file()

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        return f"smolforge train --out {shlex.quote(str(self.path))}"

    def history(self, *, frame: bool | None = None) -> Any:
        """The rows of metrics.jsonl, in the order written: steps, validations and events.

        Args:
            frame: a pandas DataFrame (True) or a list of dicts (False); where pandas is installed a DataFrame unless
                given.

        Raises:
            BadInput: there is no run here, or a DataFrame is wanted and pandas is not installed.

        Examples:
            >>> import smolforge
            >>> rows = smolforge.Run("runs/pocket").history(frame=False)
            >>> [row["step"] for row in rows if "loss" in row][:1]
            [1]
        """
        from smolforge.metrics_log import read_metrics

        if not self.exists:
            raise BadInput(f"{self.path} holds no run")
        rows = read_metrics(self)
        if frame is False or (frame is None and importlib.util.find_spec("pandas") is None):
            return rows
        try:
            import pandas
        except ModuleNotFoundError:
            raise BadInput("needs pandas", field="frame", hint="Install it: pip install pandas") from None
        return pandas.json_normalize(rows)

    @property
    def begun(self) -> bool:
        """Whether a run lies here, even one that was killed before its configuration was written."""
        return self.checkpoints_path.is_dir() and (self.exists or self.lock_path.is_file())

    def prepare(self) -> None:
        """Make the run's directories, after checking that the place is free or a run already.

        Raises:
            BadInput: the path is a file, a directory of something else, or cannot be written.
        """
        self.check_place()
        try:
            self.checkpoints_path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot make {self.path}: {error.strerror}", field="out") from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise BadInput(f"{self.path} cannot be written", field="out", hint="Check its owner and mode.")

    def check_place(self) -> None:
        """Refuse a path that holds something other than a run.

        Raises:
            BadInput: with what was found there.
        """
        if not self.path.exists() or self.exists:
            return
        if not self.path.is_dir():
            raise BadInput(f"{self.path} is a file", field="out", hint="Give a directory for the run.")
        found = sorted(entry.name for entry in self.path.iterdir() if entry.name not in _LITTER)
        # A run that was killed while it started has only these.
        prepared = {"checkpoints", "lock", "data_index.json", "tokenizer", "cache", "reference.json"}
        began = prepared if "lock" in found else {"checkpoints"}
        if set(found) <= began and not any(self.checkpoints_path.glob("*")):
            return
        if "config.json" in found or any(name.endswith(".safetensors") for name in found):
            what = "a model directory, not a run"
        else:
            what = "not empty and not a run of smolforge"
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise BadInput(
            f"{self.path} is {what} (it holds {shown})",
            field="out",
            hint="Nothing was changed. Give a new or empty directory, or that of an earlier run.",
        )

    def write_index(self, index: dict[str, Any]) -> None:
        """Replace data_index.json, atomically."""
        write_atomically(self.index_path, json.dumps(index, indent=1, ensure_ascii=False) + "\n")

    def read_index(self) -> dict[str, Any] | None:
        """The data index of this run, or None where it has none yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        return read_json(self.index_path, limit=MAX_INDEX_BYTES) if self.index_path.is_file() else None


@contextlib.contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Keep a second process from writing a run.

    Locks the file RUN/lock as filelock does: the system releases it when the holder ends, however it ends, so no lock
    is ever stale. The file stays, since removing it would let two processes lock two files of one name. On a network
    filesystem the lock may hold on one machine only; where locking is not supported at all a warning says so and the
    run continues.

    Raises:
        RunLocked: another process has it; its pid and host are named.
    """
    from filelock import lock_descriptor, unlock_descriptor

    run.lock_path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run.lock_path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            locked = lock_descriptor(descriptor, blocking=False)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.warning(f"{run.path}: this filesystem has no locks; do not start the run twice")
        else:
            if not locked:
                raise RunLocked(
                    f"{run.path} is being written by {lock_holder(run) or 'another process'}",
                    field="out",
                    hint="Wait for it, stop it, or give another directory with --out.",
                )
        holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"\n" + holder.encode())
        os.fsync(descriptor)  # other machines compare it, see `training.ranks`
        yield
    finally:
        # Unlocked by name, not only closed: a forked child may still have a copy of the descriptor.
        with contextlib.suppress(OSError):
            unlock_descriptor(descriptor)
        os.close(descriptor)


def lock_holder(run: Run) -> str:
    """What the process that locked a run wrote of itself; empty where none did."""
    if not run.lock_path.is_file():
        return ""
    with run.lock_path.open("rb", buffering=0) as file:
        file.seek(1)  # Windows keeps others from reading the first byte, which is the one that is locked
        return file.read(4096).decode(errors="replace").strip()
