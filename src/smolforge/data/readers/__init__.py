"""The formats of a shard. A new format is one file here and one line in `FORMATS` (and one in `ENDINGS`)."""

from __future__ import annotations

import importlib

from smolforge.data.shard import Context, Format, Shard

FORMATS = {
    "parquet": "smolforge.data.readers.parquet:Parquet",
    "jsonl": "smolforge.data.readers.jsonl:JsonLines",
    "txt": "smolforge.data.readers.txt:PlainText",
    "tales": "smolforge.tales.source:TalesReader",
}
ENDINGS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".txt": "txt",
    ".txt.gz": "txt",
    ".txt.zst": "txt",
}


def format_of(name: str) -> str | None:
    """The format that a file name's ending tells, or None."""
    lower = name.lower()
    return next((format for ending, format in ENDINGS.items() if lower.endswith(ending)), None)


def known_endings() -> str:
    """For messages."""
    return ", ".join(ENDINGS)


def reader(shard: Shard, context: Context) -> Format:
    """The shard, readable as rows; nothing is read yet."""
    module, _, name = FORMATS[shard.format].partition(":")
    return getattr(importlib.import_module(module), name)(shard, context)
