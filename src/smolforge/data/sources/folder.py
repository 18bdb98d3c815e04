"""Which files of a folder on this machine are its text, and which are left out and told.

All files whose ending a reader knows are text, except what only describes the data: source code, a README and the like
beside .jsonl or .parquet files, and tables without the text column beside anything else. A run that is resumed has the
files that it began with.
"""

from __future__ import annotations

import csv
import importlib.util
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolforge.data.sources import GROUPS, Context, Shard, format_of

logger = logging.getLogger(__name__)

DESCRIBING = {"readme", "license", "licence", "copying", "notice", "changelog", "contributing", "citation", "authors"}
PACKAGES = {"pdf": "pypdf", "docx": "docx"}
INSTALL = "pip install 'smolforge[documents]'"


def choose_shards(spec: str, shards: Sequence[Shard], context: Context, recorded: dict[str, Any] | None) -> list[Shard]:
    """The shards to read of all that a folder has; `recorded` is the source's entry in an earlier index."""
    if recorded is not None:
        was = {entry["file"] for entry in recorded["shards"]}
        return [shard for shard in shards if shard.name in was or shard.format in GROUPS[0]]
    if context.format != "text":
        groups = ([shard for shard in shards if shard.format in group] for group in GROUPS[:2])
        return next((group for group in groups if group), [])
    formats = {shard.format for shard in shards}
    left_out: Counter[str] = Counter()
    chosen = []
    for shard in shards:
        if why := _why_not(shard, formats, context):
            left_out[f"{ending(shard.name)} ({why})"] += 1
        else:
            chosen.append(shard)
    tell(spec, left_out)
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


def tell_unknown(spec: str, files: Sequence[Path]) -> list[Path]:
    """The files with a known ending; how many others there are of each ending is told."""
    known = [file for file in files if format_of(file.name)]
    if known:
        tell(spec, Counter(ending(file.name) for file in files if not format_of(file.name)))
    return known


def tell(spec: str, left_out: Counter[str]) -> None:
    """Tell how many files of each kind are not read."""
    if left_out:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common(12))
        more = ", and others" if len(left_out) > 12 else ""
        logger.info("%s: files that are not read: %s%s", spec, kinds, more)


def ending(name: str) -> str:
    """What messages call the kind of a file."""
    return Path(name).suffix.lower() or "without an ending"
