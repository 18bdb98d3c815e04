"""`tales` as a source of training data, and written to files of every format that smolforge reads.

As a source, document i is a pure function of i, so nothing is read and nothing stored. An epoch is its first 2**20
documents, in row groups of 512. The corpus is the same for every `data.seed`, which only decides the order, so the
losses of runs with different seeds can be compared.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smolforge import tales
from smolforge.data.readers import Reader, Row, Rows
from smolforge.data.sources import Context, Shard, Source

DOCUMENTS = 2**20
GROUP = 512
PROBE = 8  # documents whose text identifies the corpus
KINDS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt")
SEPARATOR = "<|endoftext|>"


class TalesShard(Shard):
    """The generator as one shard."""

    name, format, size = "tales", "tales", 0

    def identity(self) -> dict[str, Any]:
        probe = "\0".join(tales.document(i * (DOCUMENTS // PROBE)).text for i in range(PROBE))
        return {"documents": DOCUMENTS, "hash": hashlib.blake2b(probe.encode(), digest_size=16).hexdigest()}


class TalesReader(Reader):
    """Row groups of 512 documents."""

    def scan(self) -> list[list[int]]:
        return [[GROUP, 0] for _ in range(DOCUMENTS // GROUP)]

    def rows(self, group: int, start: int, count: int) -> Rows:
        return lambda number: Row(tales.document(group * GROUP + number).text)


def matches(spec: str) -> bool:
    """Whether SRC is the embedded corpus (a local folder of that name is written ./tales)."""
    return spec == "tales"


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None) -> Source:
    """The one shard of the generator."""
    return Source(spec, "tales", [TalesShard()], entropy_bits_per_byte=tales.entropy_bits_per_byte)


def write(
    path: str | Path, kind: str = "parquet", documents: Iterable[int] = range(1000), seed: int = 0,
    row_group_size: int = 1000, chat: bool = False,
) -> Path:  # fmt: skip
    """Write the documents with these indices as one file in Cosmopedia v2's schema; returns its path.

    Args:
        kind: one of `KINDS`; `txt` holds the texts alone, separated by `<|endoftext|>`.
        row_group_size: documents in a row group of a parquet file.
        chat: as conversations (`prompt` and `completion`): the request, and the first paragraph of what it asks for.
    """
    import pyarrow
    import pyarrow.parquet

    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is unknown; known: {', '.join(KINDS)}")
    made = (tales.document(i, seed) for i in documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        types = {"token_length": pyarrow.int64()}
        schema = pyarrow.schema({name: types.get(name, pyarrow.string()) for name in tales.COLUMNS})
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            while group := [document.row() for document in itertools.islice(made, row_group_size)]:
                writer.write_table(pyarrow.Table.from_pylist(group, schema=schema), row_group_size=row_group_size)
        return path
    compression = {"jsonl.gz": "gzip", "jsonl.zst": "zstd"}.get(kind)
    with pyarrow.output_stream(path, compression=compression, buffer_size=1 << 20) as file:
        for document in made:
            pair = {"prompt": document.prompt, "completion": document.text.split("\n\n")[0]}
            row = json.dumps(pair if chat else document.row(), ensure_ascii=False) + "\n"
            file.write((document.text + SEPARATOR if kind == "txt" else row).encode())
    return path
