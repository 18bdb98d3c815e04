"""A checkpoint of a sharded run: every process writes the tensors that it has, as files of its own.

The weights are Hugging Face's shards with an index. Other processes than the first write into a folder beside the
checkpoints, which no reader looks at; each file has its name there once it is complete. The first one moves the files
into the checkpoint that it commits (commit.py), so they are checked, hashed and become visible with all others. Where a
process fails, the folder is renamed, which ends the work of the others.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolforge.checkpoint.commit import TRAINING, is_no_room, step_name
from smolforge.checkpoint.weights import write_safetensors
from smolforge.errors import OtherProcessFailed
from smolforge.files import no_room, sync_file

if TYPE_CHECKING:
    from torch import Tensor


def new_staging(checkpoints: Path, step: int) -> Path:
    """A new folder for the files of the processes; `commit.sweep` removes what a killed process leaves of it."""
    staging = checkpoints / f".tmp-{step_name(step)}-{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    return staging


@dataclass(frozen=True)
class Parts:
    """What one of several processes writes of a checkpoint, and where.

    Attributes:
        staging: the folder of `new_staging`, which all of them see.
    """

    staging: Path
    rank: int
    world: int

    @property
    def suffix(self) -> str:
        """The end of the names of this process's files, such as `-00002-of-00004`."""
        return self._suffix(self.rank)

    def _suffix(self, rank: int) -> str:
        return f"-{rank + 1:05}-of-{self.world:05}"

    def write(self, weights: Mapping[str, Tensor], training: Mapping[str, Tensor]) -> None:
        """Write this process's files, of a process other than the first.

        Raises:
            RunFailed: no room on the disk.
            OtherProcessFailed: another process gave up.
        """
        path = self.staging
        try:
            for stem, tensors in (("model", weights), ("tensors", training)):
                path = self.staging / f"{stem}{self.suffix}.safetensors"
                temporary = path.with_suffix(".tmp")
                write_safetensors(temporary, tensors, metadata={"format": "pt"})
                sync_file(temporary)
                temporary.rename(path)
        except BaseException as error:
            if not self.staging.is_dir():
                raise OtherProcessFailed("another process could not write its part of the checkpoint") from None
            self.abandon()
            if is_no_room(error):
                needed = sum(tensor.nbytes for tensor in (*weights.values(), *training.values()))
                raise no_room(OSError(errno.ENOSPC, ""), path, needed) from error
            raise

    def collect(self, directory: Path) -> None:
        """Move the files of the other processes into the checkpoint's directory, as soon as they are complete.

        Raises:
            OtherProcessFailed: another process gave up.
        """
        for rank in range(1, self.world):
            for stem, folder in (("model", directory), ("tensors", directory / TRAINING)):
                path = self.staging / f"{stem}{self._suffix(rank)}.safetensors"
                while not path.is_file():
                    if not self.staging.is_dir():
                        raise OtherProcessFailed("another process could not write its part of the checkpoint")
                    time.sleep(0.02)
                folder.mkdir(exist_ok=True)
                path.rename(folder / path.name)
        self.staging.rmdir()

    def abandon(self) -> None:
        """Give this checkpoint up: who still writes or waits ends with an error."""
        gone = self.staging.with_name(f"{self.staging.name}-gone")
        with contextlib.suppress(OSError):
            self.staging.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
