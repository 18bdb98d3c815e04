"""What `smolforge verify` says: every checkpoint under a path, whole or with its problems."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smolforge.checkpoint import commit
from smolforge.errors import CheckpointError
from smolforge.run import Run


@dataclass(frozen=True)
class Checked:
    """One checkpoint: its problems, each naming a file; none when it is whole."""

    path: Path
    step: int | None
    bytes: int
    problems: list[str]

    @property
    def whole(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Verification:
    """All checkpoints under a path, oldest first."""

    path: Path
    checkpoints: list[Checked] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every checkpoint is."""
        return all(checked.whole for checked in self.checkpoints)

    @property
    def newest_whole(self) -> Path | None:
        """The one that resuming and generating would use."""
        return next((checked.path for checked in reversed(self.checkpoints) if checked.whole), None)

    def lines(self) -> list[str]:
        """The report for people, one line for each checkpoint and each problem."""
        text = []
        for checked in self.checkpoints:
            text.append(f"{checked.path}: {'whole' if checked.whole else 'DAMAGED'}, {checked.bytes:,} bytes")
            text += [f"  {problem}" for problem in checked.problems]
        if not self.whole:
            text.append(f"newest whole: {self.newest_whole or 'none'}")
        return text

    def as_json(self) -> dict[str, Any]:
        """The same as one JSON-able object."""
        rows = [{**asdict(checked), "path": str(checked.path), "whole": checked.whole} for checked in self.checkpoints]
        newest = str(self.newest_whole) if self.newest_whole else None
        return {"path": str(self.path), "whole": self.whole, "newest_whole": newest, "checkpoints": rows}


def verify_tree(path: str | Path) -> Verification:
    """Verify a checkpoint, a run, or a directory of checkpoints; every byte is read.

    Raises:
        CheckpointError: there is no checkpoint at `path`.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"no such directory: {path}", hint="Give a run or a checkpoint directory.")
    if (path / commit.MANIFEST).is_file() or commit.step_of(path) is not None:
        found = [path]
    else:
        folder = Run(path).checkpoints_path if Run(path).checkpoints_path.is_dir() else path
        found = [folder / commit.step_name(step) for step in commit.steps(folder)]
    if not found:
        raise CheckpointError(f"{path} holds no checkpoints", hint=f"A checkpoint has a {commit.MANIFEST}.")
    return Verification(path, [_check(directory) for directory in found])


def _check(directory: Path) -> Checked:
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return Checked(directory, commit.step_of(directory), size, commit.verify(directory))
