"""`tales` as files: the same documents in every format that smolforge reads."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from smolforge.tales import TalesDocument

KINDS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt")
SEPARATOR = "<|endoftext|>"


def write(path: Path, kind: str, documents: Iterable[TalesDocument], row_group_size: int) -> Path:
    """Write `documents` to `path`, whatever its suffix says; they are never all in memory at once.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is unknown; known: {', '.join(KINDS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        _parquet(path, documents, row_group_size)
    elif kind == "txt":
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{document.text}{SEPARATOR}" for document in documents)
    else:
        with _opened(path, kind) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(document.row(), ensure_ascii=False) + "\n" for document in documents)
    return path


def _parquet(path: Path, documents: Iterable[TalesDocument], row_group_size: int) -> None:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    schema = pyarrow.schema(
        {"prompt": text, "text": text, "token_length": pyarrow.int64(), "audience": text, "format": text,
         "seed_data": text}
    )  # fmt: skip
    rest = iter(documents)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while group := [document.row() for document in itertools.islice(rest, row_group_size)]:
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema), row_group_size=row_group_size)


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[BinaryIO]:
    # No name and no time goes into the gzip header: the same documents give the same bytes.
    with path.open("wb") as file:
        if kind == "jsonl.gz":
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                yield packed  # type: ignore[misc]
        elif kind == "jsonl.zst":
            import zstandard

            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packed:
                yield packed  # type: ignore[misc]
        else:
            yield file
