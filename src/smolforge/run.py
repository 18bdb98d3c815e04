"""The paths of a run's directory, and its small files: configuration and data index.

`metrics_log.py` has its logs and `lock.py` the lock that keeps a second process out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from smolforge.errors import BadInput, CheckpointError
from smolforge.files import write_atomically

MAX_INDEX_BYTES = 1 << 30
# What the operating system or an editor leaves behind; a directory that holds only these counts as empty.
_LITTER = {".DS_Store", "Thumbs.db", "lost+found", ".gitkeep"}


class Run:
    """The paths of one run. Making the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config_path(self) -> Path:
        """The whole resolved configuration, config.yaml."""
        return self.path / "config.yaml"

    @property
    def index_path(self) -> Path:
        """Every shard and row group of the sources, data_index.json."""
        return self.path / "data_index.json"

    @property
    def metrics_path(self) -> Path:
        """One row per logged step, validation or event, metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        """The fixed prompts' continuations through time, samples.jsonl."""
        return self.path / "samples.jsonl"

    @property
    def tensorboard_path(self) -> Path:
        """The directory of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def report_path(self) -> Path:
        """The self-contained page, report.html."""
        return self.path / "report.html"

    @property
    def checkpoints_path(self) -> Path:
        """The directory of step-00000000 directories."""
        return self.path / "checkpoints"

    @property
    def lock_path(self) -> Path:
        """The file that `RunLock` locks."""
        return self.path / "lock"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config_path.is_file()

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
        # A run that was killed before its first file has only these.
        if set(found) <= {"lock", "checkpoints"} and not _has_entries(self.checkpoints_path):
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

    def write_config(self, text: str) -> None:
        """Replace config.yaml by `text`, atomically."""
        write_atomically(self.config_path, text)

    def write_index(self, index: dict[str, Any]) -> None:
        """Replace data_index.json, atomically."""
        write_atomically(self.index_path, json.dumps(index, indent=1, ensure_ascii=False) + "\n")

    def read_index(self) -> dict[str, Any] | None:
        """The data index of this run, or None where it has none yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self.index_path.is_file():
            return None
        if self.index_path.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{self.index_path} is larger than {MAX_INDEX_BYTES >> 20} MiB")
        try:
            value = json.loads(self.index_path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.index_path} is damaged: {error}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.index_path} must hold an object")
        return value


def _has_entries(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())
