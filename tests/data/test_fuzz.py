"""Hostile files: whatever the bytes, a reader gives documents or one clear error, and never more than it may hold."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data.conftest import configured, named
from smolforge.data import Corpus
from smolforge.data import index as indexing
from smolforge.data.order import read_cursor
from smolforge.errors import SmolforgeError


def whole(texts: list[str], **keys: Any) -> bytes:
    """A parquet file in memory."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), sink, row_group_size=20, **keys)
    return sink.getvalue()


SEEDS = {
    "snappy.parquet": whole(named(60)),
    "zstd.parquet": whole(named(60), compression="zstd", use_dictionary=False, write_page_checksum=True),
    "gzip.parquet": whole(named(60), compression="gzip", data_page_version="2.0"),
    "a.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in named(20)).encode(),
    "a.txt": "<|endoftext|>".join(named(20)).encode(),
}
SEEDS["a.jsonl.gz"] = gzip.compress(SEEDS["a.jsonl"], mtime=0)
SEEDS["a.jsonl.zst"] = zstandard.compress(SEEDS["a.jsonl"])


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, bytes]:
    """A good file, hurt: bytes changed, cut, inserted, doubled; sizes that tell of 2**31 and more."""
    name = draw(st.sampled_from(sorted(SEEDS)))
    data = bytearray(SEEDS[name])
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        late = draw(st.booleans())  # footers lie at the end
        at = draw(st.integers(max(len(data) - 600, 0) if late else 0, len(data) - 1))
        how = draw(st.sampled_from(["bit", "byte", "big", "cut", "insert", "remove", "copy"]))
        if how == "bit":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte":
            data[at] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        elif how == "big":
            data[at : at + 5] = draw(
                st.sampled_from([b"\xff\xff\xff\xff\x0f", b"\xfe\xff\xff\xff\x1f", b"\x80\x80\x80\x80\x10"])
            )
        elif how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif how == "remove":
            del data[at : at + draw(st.integers(1, 20))]
        else:
            data[at:at] = data[at : at + 200]
    return name, bytes(data)


def read_all(path: Path, cache: Path) -> int:
    """Number of documents, read like a run does: the index first, then every row group."""
    with Corpus.open(configured(path, cache=1 << 22), cache_dir=cache) as corpus:
        return sum(len(d.text) > 0 for d in corpus.documents())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(mutations())
def test_a_hurt_file_gives_documents_or_a_clear_error(tmp_path_factory: Any, case: tuple[str, bytes]) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    path = folder / case[0]
    path.write_bytes(case[1])
    try:
        read_all(path, folder)
    except SmolforgeError as error:
        assert str(error).strip()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(SEEDS)), st.binary(max_size=300))
def test_noise_gives_documents_or_a_clear_error(tmp_path_factory: Any, name: str, noise: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(b"PAR1" + noise + b"PAR1" if name.endswith("parquet") else noise)
    try:
        read_all(path, folder)
    except SmolforgeError as error:
        assert str(error).strip()


def test_a_dictionary_bomb_is_stopped_while_it_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4096, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"text": column}), path, store_schema=False)
    monkeypatch.setattr("smolforge.data.readers.parquet.MAX_UNPACKED", 100 << 20)
    assert path.stat().st_size < 2_000_000
    with pytest.raises(SmolforgeError, match="unpack to over"):
        read_all(path, tmp_path)


@pytest.mark.parametrize("claim", [2**31 - 1, 2**40, -5])
def test_a_footer_that_claims_rows_it_does_not_have(tmp_path: Path, claim: int) -> None:
    # The number of rows of the one row group appears as a zigzag varint; 4242 is 0xa4 0x42 (8484).
    good = whole_one_group(4242)
    assert good.count(b"\xa4\x42") >= 2

    def varint(n: int) -> bytes:
        n = (n << 1) ^ (n >> 63)
        out = b""
        while n > 127:
            out += bytes([n & 127 | 128])
            n >>= 7
        return out + bytes([n])

    footer = int.from_bytes(good[-8:-4], "little")
    head, tail = good[: -footer - 8], good[-footer - 8 : -8].replace(b"\xa4\x42", varint(claim))
    path = tmp_path / "claims.parquet"
    path.write_bytes(head + tail + struct.pack("<I", len(tail)) + b"PAR1")
    with pytest.raises(SmolforgeError):
        read_all(path, tmp_path)


def whole_one_group(rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["x"] * rows}), sink, write_statistics=False)
    return sink.getvalue()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
CURSOR_KEYS = ["version", "step", "index", "seed", "lane_count", "lanes"]


@settings(max_examples=300, derandomize=True)
@given(st.dictionaries(st.sampled_from(CURSOR_KEYS), JSON | st.just(1)) | JSON, st.booleans())
def test_a_hostile_cursor_or_index_is_refused(value: Any, fill: bool) -> None:
    if fill and isinstance(value, dict):
        value = {"version": 1, "step": 0, "index": "i", "seed": 0, "lane_count": 2, **value}
    with contextlib.suppress(SmolforgeError):
        read_cursor(value, index="i", seed=0, lane_count=2, sources=1)
    if isinstance(value, dict):
        value = {"version": 1, "hash": "x", "sources": value.get("lanes")}
    with pytest.raises(SmolforgeError):
        indexing.check(value)
