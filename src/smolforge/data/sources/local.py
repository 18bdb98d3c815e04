"""SRC is a local file, folder or glob.

A folder is searched through and through for files of known formats; hidden files and those of other endings are
passed over. A file named outright must have a known ending. The identity of a local shard is a hash of its bytes
(of a large one: of evenly spread samples, its first and its last megabyte, where a parquet file keeps its
footer), so a copied or touched corpus is still the same; an unchanged size and time of change saves the hashing.
"""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path
from typing import Any

from smolforge.data.readers import format_of, known_endings
from smolforge.data.shard import Context, Shard, Source
from smolforge.errors import DataError, SourceChanged

WHOLE_HASH = 64 << 20
SAMPLE = 1 << 20
SAMPLES = 32


class LocalShard(Shard):
    """A file on this machine."""

    def __init__(self, path: Path, name: str, format: str) -> None:
        self.path, self.name, self.format = path, name, format
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}", field="data.sources") from None
        self.size, self._changed = stat.st_size, stat.st_mtime_ns
        if not self.size:
            raise DataError(f"{path} is empty", field="data.sources", hint="Remove it or fill it.")
        self._hash: str | None = None

    def read(self, start: int, length: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(length)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None
        if len(data) != length:
            raise SourceChanged(
                f"{self.path} ends at byte {start + len(data):,}; it had {self.size:,} bytes when it was indexed"
            )
        return data

    def whole(self) -> Path:
        return self.path

    def identity(self) -> dict[str, Any]:
        if self._hash is None:
            self._hash = self._fingerprint()
        return {"hash": self._hash}

    def same_as(self, recorded: dict[str, Any]) -> str | None:
        if recorded["size"] == self.size and recorded.get("changed") == self._changed:
            self._hash = recorded["identity"].get("hash")
        return super().same_as(recorded)

    def notes(self) -> dict[str, Any]:
        return {"changed": self._changed}

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(str(self.size).encode(), digest_size=16)
        whole = self.size <= WHOLE_HASH or self.format != "parquet"
        try:
            with self.path.open("rb") as file:
                if whole:
                    while block := file.read(SAMPLE):
                        digest.update(block)
                else:
                    for i in range(SAMPLES):
                        file.seek((self.size - SAMPLE) * i // (SAMPLES - 1))
                        digest.update(file.read(SAMPLE))
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None
        return digest.hexdigest()


def matches(spec: str) -> bool:
    """Whether SRC is this kind: whatever nothing else claims."""
    return True


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None) -> Source:
    """The files that a path or glob names.

    Raises:
        DataError: there are none, one cannot be read, is empty, or has an unknown ending.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        named, root = _walk(path), path
        problem = f"folder {spec} holds no text"
    elif path.exists():
        named, root = [path], path.parent
        problem = ""
    elif glob.has_magic(spec):
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (a pattern with its own root)
        named = sorted(p for p in found if p.is_file())
        root = Path(os.path.commonpath([p.parent for p in named])) if named else path
        problem = f"no file matches {spec}"
    else:
        raise DataError(f"no such file or folder: {spec}", field="data.sources", hint=_hint(spec))
    if not named:
        raise DataError(problem, field="data.sources", hint=f"Known endings: {known_endings()}.")
    shards: list[Shard] = []
    for file in sorted(named, key=lambda p: p.relative_to(root).as_posix()):
        format = format_of(file.name)
        if format is None:
            raise DataError(
                f"{file} has an unknown ending",
                field="data.sources",
                hint=f"Known endings: {known_endings()}.",
            )
        shards.append(LocalShard(file, file.relative_to(root).as_posix(), format))
    return Source(spec, "local", shards)


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(folder, f) for f in files if not f.startswith(".") and format_of(f)]
    return found


def _hint(spec: str) -> str:
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
        return f"For a dataset of the Hub write {spec}:CONFIG or hf://datasets/{spec}/PATH."
    return "SRC is a file, folder or glob, a URL, hf://datasets/OWNER/NAME/PATH, OWNER/NAME:CONFIG, or tales."
