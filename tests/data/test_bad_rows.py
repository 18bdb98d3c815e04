"""Rows that cannot be used: found when the index is made, an error or left out, counted, and the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.conftest import Bytes, Logged, batches, digests, jsonl, named, resumed
from smolforge.data import Loader, batch_of_step
from smolforge.errors import DataError

TEXTS = named(60)
BAD = {
    "without the column": b'{"id": 7}\n',
    "of another type": b'{"text": ["a"]}\n',
    "a list": b"[1]\n",
    "a line cut short": b'{"text": "half of a \n',
    "zeros after a crash": b"\0" * 50 + b"\n",
    "not UTF-8": b'{"text": "caf\xe9"}\n',
}


def with_bad_rows(path: Path) -> Path:
    """60 documents, and a bad row of each kind after every ninth."""
    lines = jsonl(path, TEXTS).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(BAD.values(), 1):
        lines.insert(9 * number, line)
    path.write_bytes(b"".join(lines))
    return path


def bad_parquet(path: Path, count: int = 60) -> Path:
    """Documents, of which number 41 is not UTF-8; parquet tells that only where the row is read."""
    texts: list[Any] = [text.encode() for text in named(count)]
    texts[41] = b"caf\xe9 au lait"
    column = pa.Array.from_buffers(pa.string(), count, pa.array(texts, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), path, row_group_size=10)
    return path


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_a_late_bad_row_is_an_error_before_anything_trains(opened: Any, tmp_path: Path, line: bytes) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(DataError, match=r"a.jsonl, line 61(.|\n)*data.on_error=skip"):
        opened(path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # the last line, without its end
    with pytest.raises(DataError, match=r"a\.jsonl, line 61"):
        opened(path)


def test_bad_rows_are_left_out_and_told(opened: Any, tmp_path: Path, logged: Logged) -> None:
    corpus = opened(with_bad_rows(tmp_path / "a.jsonl"), on_error="skip")
    assert [document.text for document in corpus.documents()] == TEXTS
    assert sum("6 rows cannot be used" in line and "line 10 has no column 'text'" in line for line in logged()) == 1
    assert corpus.index["sources"][0]["shards"][0]["bad_rows"] == 6


def test_where_every_row_is_bad_the_column_is_wrong(opened: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="first line has no column 'content'"):
        opened(jsonl(tmp_path / "a.jsonl", TEXTS), on_error="skip", text_column="content")


def test_a_piece_of_a_text_that_is_not_utf8_is_left_out(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"<|endoftext|>".join([b"one", b"tw\xff", b"three"]))
    assert [d.text for d in opened(tmp_path / "a.txt", on_error="skip").documents()] == ["one", "three"]
    with pytest.raises(DataError, match="0xff at offset 18"):
        opened(tmp_path / "a.txt")


@pytest.mark.parametrize("make", [with_bad_rows, bad_parquet])
def test_a_resumed_stream_has_the_same_batches_and_counts(opened: Any, tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / ("a.jsonl" if make is with_bad_rows else "a.parquet"))
    corpus = opened(path, on_error="skip", lanes=4, holdout=0)
    made = batches(corpus, 30)
    passed = [row.address for batch in made for row in batch.left_out]
    counts = [sum(batch.cursor.get("bad_rows", {}).values()) for batch in made]
    assert counts[-1] == len(passed) >= len(set(passed)) == (6 if make is with_bad_rows else 1)
    assert all("text" in row.problem or "JSON" in row.problem or "UTF-8" in row.problem
               for batch in made for row in batch.left_out)  # fmt: skip
    again = opened(path, on_error="skip", lanes=4, holdout=0, index=json.loads(json.dumps(corpus.index)))
    for at in (0, 3, 11, 20):
        for workers in (0, 2):
            rest = batches(again, 29 - at, cursor=resumed([made[at].cursor]), workers=workers)
            assert digests(rest) == digests(made[at + 1 :])
            assert [batch.left_out for batch in rest] == [batch.left_out for batch in made[at + 1 :]]
            assert rest[-1].cursor == made[-1].cursor
    ranks = [batches(again, 30, rank=rank, world=2) for rank in range(2)]
    merged = resumed([ranks[0][-1].cursor, ranks[1][-1].cursor])
    assert merged == made[-1].cursor
    step = next(batch.step for batch in made if batch.left_out)
    assert batch_of_step(corpus, Bytes(), None, step, sequences_per_step=4).left_out == made[step].left_out


def test_skipping_can_begin_where_failing_stopped(opened: Any, tmp_path: Path) -> None:
    path = bad_parquet(tmp_path / "a.parquet")
    whole = digests(batches(opened(path, on_error="skip", holdout=0), 30))
    failing = opened(path, holdout=0)
    made = []
    with (
        Loader(failing, Bytes(), sequences_per_step=4) as loader,
        pytest.raises(DataError, match=r"row \d is not UTF-8"),
    ):
        made.extend(loader)  # as long as it goes
    assert 0 < len(made) < 30
    rest = batches(opened(path, on_error="skip", holdout=0), 30 - len(made), cursor=resumed([made[-1].cursor]))
    assert digests(made) + digests(rest) == whole
