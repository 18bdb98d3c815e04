"""Conversations for tests, and files of them in every form and format."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolforge import tales

Messages = list[dict[str, str]]


def conversations(count: int) -> list[Messages]:
    """Conversations of one or two turns and of many lengths."""
    made: list[Messages] = []
    for i in range(count):
        text = tales.document(i).text
        sentences = text.split(". ")
        turns = [
            {"role": "user", "content": f"Question {i}: {text[: 5 + i % 7 * 9]}?"},
            {"role": "assistant", "content": sentences[0][: 12 + i % 11 * 7]},
        ]
        if i % 3 == 0:
            turns += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": sentences[1][:40]}]
        made.append(turns)
    return made


def rows_of(made: Sequence[Messages]) -> list[dict[str, Any]]:
    return [{"messages": messages} for messages in made]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as a file of the format that the ending tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=13)
    return path
