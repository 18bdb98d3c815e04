"""Write files so that a crash leaves the old file or the new one, and read JSON, and JSON lines that may be torn."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolforge.errors import BadInput, CheckpointError, RunFailed

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
MAX_JSON_BYTES = 64 << 20


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`.

    Raises:
        RunFailed: no room on the disk; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing_file(path, needed=len(data)) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing_file(path: Path, *, needed: int = 0, hint: str | None = None) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is fsynced and renamed to `path`, on failure removed.

    Args:
        needed: bytes that will be written, for the error where the disk is full.
        hint: what to do about a full disk; "start again" unless given.

    Raises:
        RunFailed: no room on the disk; the old file is untouched.
        BadInput: `path` is a directory or a device.
    """
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is there and is not a file", hint="Give the path of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name differs per call, so that two threads or processes may write one path at once. Made by open() and not
    # by mkstemp, whose mode (0600) would keep other users from reading the file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    with _moved_on_success(temporary, path, needed, hint):
        yield temporary
        sync_file(temporary)


@contextlib.contextmanager
def replacing_directory(path: Path, *, needed: int = 0, hint: str | None = None) -> Iterator[Path]:
    """Give an empty temporary directory beside `path`; on success it is renamed to `path`, on failure removed.

    Raises:
        RunFailed: no room on the disk.
        OSError: `path` is a directory with something in it, or cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkdir's mode follows the umask; tempfile.mkdtemp would make a directory that only its owner may read.
    temporary = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    temporary.mkdir()
    with _moved_on_success(temporary, path, needed, hint):
        yield temporary


@contextlib.contextmanager
def _moved_on_success(temporary: Path, path: Path, needed: int, hint: str | None) -> Iterator[None]:
    try:
        yield
        temporary.replace(path)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise no_room(error, path, needed, hint) from None
        raise
    sync_directory(path.parent)


def no_room(error: OSError, path: Path, needed: int, hint: str | None = None) -> Exception:
    """The error for a write that found the disk full; any other `error` is returned unchanged."""
    if error.errno not in NO_ROOM:
        return error
    amount = f"{needed:,} bytes are needed, " if needed else ""
    return RunFailed(
        f"no room on the disk for {path}: {amount}{free_bytes(path.parent):,} are free",
        hint=hint or "Free some room and start the same command again; the run continues from its last checkpoint.",
    )


def free_bytes(directory: Path) -> int:
    """Bytes that an ordinary user can still write where `directory` is (or will be)."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return shutil.disk_usage(directory).free


def user_cache() -> Path:
    """smolforge's folder in the user's cache, where the system has it: $XDG_CACHE_HOME or ~/.cache on Linux."""
    import platformdirs

    return platformdirs.user_cache_path("smolforge", appauthor=False)


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows flushes only what could be written
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush the names in `directory` to the disk: files are fsynced one by one, their names with this."""
    if os.name == "nt":  # which opens no directories, and keeps names in its journal
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE filesystems cannot sync a directory; their renames are synchronous.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES, field: str | None = None) -> dict[str, Any]:
    """The object in a JSON file of bounded size.

    Args:
        field: what errors call the file; its path unless given.

    Raises:
        CheckpointError: missing, too large, not JSON, not an object, or a key is given twice.
    """
    field = field or str(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"is too large for this kind of file: {size:,} bytes", field=field)
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", field=field) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", field=field) from None
    if not isinstance(value, dict):
        raise CheckpointError("must hold a JSON object", field=field)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} is given twice")
    return value


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines that may still be written to; torn or unreadable lines are left out."""
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
