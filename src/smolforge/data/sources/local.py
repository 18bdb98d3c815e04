"""SRC is a local file, folder or glob.

All files of a folder whose ending a reader knows are its text, except what only describes the data: source code, a
README and the like beside .jsonl or .parquet files, and tables without the text column beside anything else. What is
left out is told; hidden files are passed over. A run that is resumed has the files that it began with.

The identity of a local shard is a hash of its bytes (of a large parquet file: of samples, its first and last megabyte
among them), so a copied or touched corpus is still the same; an unchanged size and modification time saves the hashing.
"""

from __future__ import annotations

import csv
import functools
import glob
import hashlib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolforge.data.sources import CHAT_GROUPS, GROUPS, Context, Shard, Source, check_ending, format_of, no_known_file
from smolforge.errors import DataError, SourceChanged
from smolforge.formatting import plural
from smolforge.run import Run

logger = logging.getLogger(__name__)

WHOLE_HASH = 64 << 20  # parquet files up to this size are hashed as a whole
SAMPLE = 1 << 20
SAMPLES = 32
DESCRIBING = {"readme", "license", "licence", "copying", "notice", "changelog", "contributing", "citation", "authors"}
PACKAGES = {"pdf": "pypdf", "docx": "docx"}
INSTALL = "pip install 'smolforge[documents]'"


def read_file(path: Path, start: int, length: int) -> bytes:
    """Up to `length` bytes of a file; DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


class LocalShard(Shard):
    """A file on this machine."""

    def __init__(self, path: Path, name: str, format: str) -> None:
        self.path, self.name, self.format = path, name, format
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}", field="data.sources") from None
        self.size, self.notes = stat.st_size, {"changed": stat.st_mtime_ns}
        if not self.size:
            raise DataError(f"{path} is empty", field="data.sources", hint="Remove it or fill it.")

    def read(self, start: int, length: int) -> bytes:
        data = read_file(self.path, start, length)
        if len(data) != length:
            had = f"it had {self.size:,} bytes when it was indexed"
            raise SourceChanged(f"{self.path} ends at byte {start + len(data):,}; {had}")
        return data

    def whole(self) -> Path:
        return self.path

    def identity(self) -> dict[str, Any]:
        return {"hash": self._hash}

    def difference(self, recorded: dict[str, Any]) -> str | None:
        if recorded["size"] == self.size and recorded.get("changed") == self.notes["changed"]:
            self._hash = str(recorded["identity"].get("hash"))
        return super().difference(recorded)

    @functools.cached_property
    def _hash(self) -> str:
        digest = hashlib.blake2b(str(self.size).encode(), digest_size=16)
        if self.format == "parquet" and self.size > WHOLE_HASH:
            starts = [(self.size - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES)]
        else:
            starts = list(range(0, self.size, SAMPLE))
        for start in starts:
            digest.update(read_file(self.path, start, SAMPLE))
        return digest.hexdigest()


def matches(spec: str) -> bool:
    """Whether SRC is local: whatever no other source matches."""
    return True


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None) -> Source:
    """The files that a path or glob names."""
    path = Path(spec).expanduser()
    problem = f"folder {spec} holds no text"
    if path.is_dir():
        named, root = _tell_unknown(spec, _walk(path)), path
    elif path.exists():
        named, root = [path], path.parent
    elif glob.has_magic(spec):
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (a pattern with its own root)
        named = sorted(p for p in found if p.is_file())
        named = [p for p in named if not any(Run(folder).begun for folder in p.parents)] or named
        root = Path(os.path.commonpath([p.parent for p in named])) if named else path
        problem = f"no file matches {spec}"
    else:
        hint = "If it moved, name its new place: --data PATH." if recorded else _hint(spec)
        raise DataError(f"no such file or folder: {spec}", field="data.sources", hint=hint)
    if not named:
        raise no_known_file(problem)
    filled = [file for file in named if file.stat().st_size]
    if filled and len(filled) < len(named):
        logger.warning("%s: %s passed over", spec, plural(len(named) - len(filled), "empty file"))
    shards: list[Shard] = []
    for file in sorted(filled or named, key=lambda p: p.relative_to(root).as_posix()):
        format = check_ending(file.name, str(file))
        # A file's name need not be UTF-8, but the index is.
        name = os.fsencode(file.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
        shards.append(LocalShard(file, name, format))
    if path.is_dir() and not (shards := _choose_shards(spec, shards, context, recorded)):
        raise no_known_file(problem if context.format == "text" else f"folder {spec} holds no conversations")
    return Source(spec, "local", shards)


def _walk(root: Path) -> list[Path]:
    """All files below a folder without runs and hidden files; links are followed, to each folder and file once."""
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        place = Path(folder).resolve()
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        # A run lies often among its data, and its logs and tokenizer are no text to train on.
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not Run(Path(folder, f)).begun)
        found += [Path(folder, f) for f in sorted(files) if not f.startswith(".")]
    if not any(path.is_symlink() for path in found):
        return found
    found, listed = [path for path in found if path.exists()], len(found)
    if len(found) < listed:
        logger.warning("%s: %s passed over", root, plural(listed - len(found), "broken link"))
    once: dict[Path, Path] = {}
    # A link to a file that is there as well is left out, unless only the link has an ending that tells the format.
    for path in sorted(found, key=lambda path: (format_of(path.name) is None, path.is_symlink())):
        once.setdefault(path.resolve(), path)
    return list(once.values())


def _hint(spec: str) -> str:
    owner, slash, name = spec.partition("/")
    if slash and owner and name and "/" not in name and not spec.startswith((".", "~")):
        return f"For a dataset of the Hub write {spec}:CONFIG or hf://datasets/{spec}/PATH."
    return "SRC is a file, folder or glob, a URL, hf://datasets/OWNER/NAME/PATH, OWNER/NAME:CONFIG, or tales."


def _choose_shards(
    spec: str, shards: Sequence[Shard], context: Context, recorded: dict[str, Any] | None
) -> list[Shard]:
    """The shards to read of all that a folder has; `recorded` is the source's entry in an earlier index."""
    formats, chat = {shard.format for shard in shards}, context.format != "text"
    if recorded is not None:
        kept, news = {entry["file"] for entry in recorded["shards"]}, (CHAT_GROUPS if chat else GROUPS)[0]
        # A file that the run did not begin with makes its data others, unless a new run would leave it out too.
        kept |= {s.name for s in shards if s.format in news and (chat or not _why_not(s, formats, context))}
        return [shard for shard in shards if shard.name in kept]
    if chat:
        groups = ([shard for shard in shards if shard.format in group] for group in CHAT_GROUPS)
        return next((group for group in groups if group), [])
    left_out: Counter[str] = Counter()
    chosen = []
    for shard in shards:
        if why := _why_not(shard, formats, context):
            left_out[f"{_ending(shard.name)} ({why})"] += 1
        else:
            chosen.append(shard)
    _tell(spec, left_out)
    return chosen


def _why_not(shard: Shard, formats: set[str], context: Context) -> str | None:
    """Why a shard is not read, or None where it is."""
    path = Path(shard.name)
    package = PACKAGES.get(shard.format)
    if package and importlib.util.find_spec(package) is None:
        return f"needs {INSTALL}"
    if formats & {"parquet", "jsonl"}:
        if path.stem.split(".")[0].lower() in DESCRIBING:
            return "describes the data"
        if shard.format == "code":
            return "code beside data"
    if shard.format in GROUPS[1] and formats - GROUPS[1] and not _has_column(shard, context):
        return f"no column {context.column!r}"
    return None


def _has_column(shard: Shard, context: Context) -> bool:
    """Whether the beginning of a json, csv or tsv file has the text column."""
    from smolforge.data.readers import open_reader

    reader: Any = open_reader(shard, context)
    head = next(reader.blocks(), b"").decode("utf-8-sig", "replace")
    if shard.format == "json":
        return f'"{context.column}"' in head
    delimiter = "\t" if shard.format == "tsv" else ","
    return context.column in next(csv.reader(head.splitlines()[:1], delimiter=delimiter), [])


def _tell_unknown(spec: str, files: Sequence[Path]) -> list[Path]:
    """The files with a known ending; how many others there are of each ending is told."""
    known = [file for file in files if format_of(file.name)]
    if known:
        _tell(spec, Counter(_ending(file.name) for file in files if not format_of(file.name)))
    return known


def _tell(spec: str, left_out: Counter[str]) -> None:
    if left_out:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common(12))
        more = ", and others" if len(left_out) > 12 else ""
        logger.info("%s: files that are not read: %s%s", spec, kinds, more)


def _ending(name: str) -> str:
    return Path(name).suffix.lower() or "without an ending"
