"""A run on disk: where its files are, its logs, and the lock that keeps a second process out.

Read by everyone (report, serving, command line), written by training. Logs are append-only JSON lines: a row
is one `write`, so that a killed process can tear only the last line, and a torn line is cut when the log is
opened again. A resumed run takes back the rows after the step it goes on from, so that its log ends equal to
that of a run which was never interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from smolforge.errors import BadInput, CheckpointError, RunFailed, RunLocked

_CHUNK = 1 << 20
MAX_INDEX_BYTES = 1 << 30
# What the operating system or an editor leaves behind; a directory that holds only these counts as empty.
_LITTER = {".DS_Store", "Thumbs.db", "lost+found", ".gitkeep"}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Run:
    """The paths of one run. Making the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config(self) -> Path:
        """The whole resolved configuration, config.yaml."""
        return self.path / "config.yaml"

    @property
    def index(self) -> Path:
        """Every shard and row group of the sources, data_index.json."""
        return self.path / "data_index.json"

    @property
    def metrics(self) -> Path:
        """One row per logged step, validation or event, metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """The fixed prompts' continuations through time, samples.jsonl."""
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The directory of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The self-contained page, report.html."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The directory of step-00000000 directories."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """The file that `RunLock` locks."""
        return self.path / "lock"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file()

    def prepare(self) -> None:
        """Make the run's directories, after checking that the place is free or a run already.

        Raises:
            BadInput: the path is a file, a directory of something else, or cannot be written.
        """
        self.check_place()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
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
        if set(found) <= {"lock", "checkpoints"} and not _has_entries(self.checkpoints):
            return
        if "config.json" in found or any(name.endswith(".safetensors") for name in found):
            what = "a model directory, not a run"
        else:
            what = "not empty and no run of smolforge"
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise BadInput(
            f"{self.path} is {what} (it holds {shown})",
            field="out",
            hint="Nothing was changed. Give a new or empty directory, or that of an earlier run.",
        )

    def write_config(self, text: str) -> None:
        """Replace config.yaml by `text`, atomically."""
        write_atomically(self.config, text)

    def write_index(self, index: dict[str, Any]) -> None:
        """Replace data_index.json, atomically."""
        write_atomically(self.index, json.dumps(index, indent=1, ensure_ascii=False) + "\n")

    def read_index(self) -> dict[str, Any] | None:
        """The data index of this run, or None where it has none yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self.index.is_file():
            return None
        if self.index.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{self.index} is larger than {MAX_INDEX_BYTES >> 20} MiB")
        try:
            value = json.loads(self.index.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.index} is damaged: {error}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.index} must hold an object")
        return value


def _has_entries(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: a reader or a crash sees the old file or the new one, never a part.

    Raises:
        RunFailed: no room on the disk; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise no_room(error, path, len(data)) from None
    sync_directory(path.parent)


def no_room(error: OSError, path: Path, needed: int) -> Exception:
    """The error for a write that found no room; any other `error` is given back as it is."""
    if error.errno not in NO_ROOM:
        return error
    return RunFailed(
        f"no room on the disk for {path}: {needed:,} bytes are needed, {free_bytes(path.parent):,} are free",
        hint="Free some room and start the same command again; the run goes on from its last checkpoint.",
    )


def free_bytes(directory: Path) -> int:
    """Bytes that an ordinary user can still write where `directory` is (or will be)."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power cut: files are fsynced one by one, names with this."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE filesystems cannot sync a directory; their renames are synchronous.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


class MetricsLog:
    """An append-only file of JSON rows: metrics.jsonl, and samples.jsonl alike.

    Opening cuts a torn last line. A row is one `write`, so readers see whole rows. Non-finite floats are written
    as null, since JSON has no word for them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        whole = _end_of_last_whole_row(self._descriptor)
        self.torn_bytes = os.fstat(self._descriptor).st_size - whole
        """Bytes of a torn last line that opening cut off."""
        if self.torn_bytes:
            os.ftruncate(self._descriptor, whole)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row.

        Raises:
            RunFailed: no room on the disk; the rows before are whole.
        """
        line = (json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
        before = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):  # a nearly full disk takes a part first and fails at the next write
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise no_room(error, self.path, len(line)) from None

    def truncate_after(self, step: int) -> int:
        """Take back all rows of later steps than `step`; the number of rows removed. Atomic."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            write_atomically(self.path, b"".join(kept))
            os.close(self._descriptor)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        return len(lines) - len(kept)

    def sync(self) -> None:
        """Make all rows so far survive a power cut."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_of_last_whole_row(descriptor: int) -> int:
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _CHUNK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _step_of(line: bytes) -> float:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf  # torn by a power cut: it goes with the later rows
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else -1


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a log that may still be written to; torn or unreadable lines are passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def read_metrics(run: Run | str | Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl: training, validation and events, in the order written."""
    return list(read_rows((run if isinstance(run, Run) else Run(run)).metrics))


def read_samples(run: Run | str | Path) -> list[dict[str, Any]]:
    """All rows of a run's samples.jsonl."""
    return list(read_rows((run if isinstance(run, Run) else Run(run)).samples))


class RunLock:
    """Keeps a second process from writing a run. A context manager.

    `flock` on RUN/lock: the kernel lets go when the holder ends, however it ends, so there is no stale lock. The
    file stays, since removing it would let two processes lock two files of one name. On a network filesystem the
    lock may hold on one machine only; where locking is not supported at all this is said, and the run goes on.
    """

    def __init__(self, run: Run, say: Callable[[str], None] | None = None) -> None:
        self.run = run
        self._say = say or (lambda text: None)
        self._descriptor = -1

    @property
    def held(self) -> bool:
        """Whether this object has the run (or the filesystem cannot lock)."""
        return self._descriptor >= 0

    def acquire(self) -> RunLock:
        """Take the run.

        Raises:
            RunLocked: another process has it; its pid and host are named.
        """
        import fcntl

        self.run.lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise RunLocked(
                f"{self.run.path} is being written by {holder}",
                field="out",
                hint="Wait for it, stop it, or give another directory with --out.",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(descriptor)
                raise
            self._say(f"{self.run.path}: this filesystem has no locks; do not start the run twice")
        self._descriptor = descriptor
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {started}\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        return self

    def release(self) -> None:
        """Let the run go; a second call does nothing."""
        if self.held:
            import fcntl

            # Unlocked by name, not only closed: a forked child may still have a copy of the descriptor.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RunLock:
        return self if self.held else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
