"""The footer reader against pyarrow's own, large row groups, and what must not be trusted."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.conftest import batches, configured, digests, named, parquet
from faults.server import FaultServer
from smolforge.data import Corpus, Network
from smolforge.data.readers import parquet as reader
from smolforge.data.readers.parquet import BadFooter, column_chunks
from smolforge.errors import DataError


def footer_of(data: bytes) -> bytes:
    """The serialized metadata of a parquet file."""
    length = int.from_bytes(data[-8:-4], "little")
    return data[-8 - length : -8]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 50),
    st.integers(1, 20),
    st.sampled_from(["none", "zstd", "snappy"]),
    st.booleans(),
    st.booleans(),
    st.permutations(["text", "number", "nested", "list", "raw"]),
)
def test_the_footer_reader_agrees_with_pyarrow(
    rows: int, group: int, codec: str, dictionary: bool, index: bool, order: list[str]
) -> None:
    columns = {
        "text": pa.array(named(rows), pa.string()),
        "number": pa.array(range(rows), pa.int64()),
        "nested": pa.array([{"text": "x", "deep": {"text": i}} for i in range(rows)],
                           pa.struct([("text", pa.string()), ("deep", pa.struct([("text", pa.int32())]))])),
        "list": pa.array([["a"] * (i % 3) for i in range(rows)], pa.list_(pa.string())),
        "raw": pa.array([b"\xff"] * rows, pa.binary()),
    }  # fmt: skip
    sink = io.BytesIO()
    table = pa.table({name: columns[name] for name in order})
    pq.write_table(
        table, sink, row_group_size=group, compression=codec, use_dictionary=dictionary, write_page_index=index
    )
    meta = pq.read_metadata(sink)
    leaf = next(i for i in range(len(meta.schema)) if meta.schema.column(i).path == "text")
    expected = []
    for g in range(meta.num_row_groups):
        chunk = meta.row_group(g).column(leaf)
        start = chunk.data_page_offset
        if chunk.has_dictionary_page:
            start = min(start, chunk.dictionary_page_offset)
        expected.append((meta.row_group(g).num_rows, chunk.total_uncompressed_size, start, chunk.total_compressed_size))
    place = sum(LEAVES[name] for name in order[: order.index("text")])
    assert place == leaf
    found = column_chunks(footer_of(sink.getvalue()), leaf, len(meta.schema))
    assert [tuple(chunk) for chunk in found] == expected
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        path.write_bytes(sink.getvalue())
        if rows:
            with Corpus.open(configured(path)) as corpus:
                groups = corpus.index["sources"][0]["shards"][0]["groups"]
            assert [tuple(group) for group in groups] == expected
            for name in ("nothing", "deep"):
                with pytest.raises(DataError, match="no column"), Corpus.open(configured(path, text_column=name)):
                    pass


@settings(max_examples=300, derandomize=True)
@given(st.binary(max_size=400), st.data())
def test_the_footer_reader_refuses_noise(noise: bytes, data: st.DataObject) -> None:
    good = bytearray(FOOTER)
    for _ in range(data.draw(st.integers(0, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    for content in (noise, bytes(good[: data.draw(st.integers(0, len(good)))]), bytes(good)):
        try:
            chunks = column_chunks(content, 1, 2)
        except BadFooter as error:
            assert str(error)
        else:
            assert len(chunks) <= len(content)


def _footer() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": list(range(30)), "text": named(30)}), sink, row_group_size=10)
    return footer_of(sink.getvalue())


FOOTER = _footer()
LEAVES = {"text": 1, "number": 1, "nested": 2, "list": 1, "raw": 1}


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x19\xfc" + b"\xff" * 9 + b"\x01",  # a list of 2**64 structs
        b"\x29\xfc\xff\xff\xff\x7f",
        b"\x48" + b"\xff\xff\xff\xff\x0f" + b"x",  # a string of 4 GB
        b"\x1c" * 5000,  # a struct in a struct in a struct ...
        b"\x19\x19" * 5000,
        b"\x1b\xff\xff\x7f\xcc",
        b"\x15" + b"\x80" * 20,
    ],
)
def test_sizes_are_checked_before_anything_is_made(bomb: bytes) -> None:
    with pytest.raises(BadFooter):
        column_chunks(bomb, 0, 1)


def test_the_footer_that_aborted_the_process_is_an_error(opened: Any, tmp_path: Path) -> None:
    # size_statistics whose histogram has the wrong length: pyarrow's row_group(i).column(j) calls std::terminate.
    data = parquet(tmp_path / "a.parquet", named(20), 10, compression="none", use_dictionary=False).read_bytes()
    footer = footer_of(data)
    hurt = 0
    for at in range(0, len(footer), 3):
        path = tmp_path / "b.parquet"
        changed = footer[:at] + bytes([footer[at] ^ 8]) + footer[at + 1 :]
        path.write_bytes(data[: -len(footer) - 8] + changed + data[-8:])
        try:
            list(opened(path).documents())
        except DataError:
            hurt += 1
    assert hurt > len(footer) / 12


def test_a_large_row_group_is_cut_and_its_chunk_streamed(
    opened: Any, network: Network, server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{i} " + "abcdefgh" * (i % 90) for i in range(3000)]
    path = parquet(
        tmp_path / "a.parquet",
        texts,
        3000,
        compression="none",
        use_dictionary=False,
        data_page_size=20_000,
        write_batch_size=20,
    )
    monkeypatch.setattr("smolforge.data.order.MAX_RANGE_BYTES", 100_000)
    truth = digests(batches(opened(path, lanes=1), 40))
    assert len(opened(path, lanes=1).orders[0].ranges) > 9
    monkeypatch.setattr(reader, "SHARED_GROUP", 0)  # nothing is shared: each slice is read by itself
    assert digests(batches(opened(path, lanes=1), 40)) == truth
    monkeypatch.setattr(reader, "MAX_HELD_CHUNK", 0)
    monkeypatch.setattr(reader, "STREAM", 10_000)
    server.files["a.parquet"] = path.read_bytes()
    corpus = opened(server.url("a.parquet"), network=network, cache=0, lanes=1)
    server.reset()
    first = corpus.orders[0].ranges[0]
    assert corpus.read(0, first)(0).text == texts[0]
    assert server.sent < path.stat().st_size / 4  # it stopped where the slice ends
    assert digests(batches(corpus, 40)) == truth


def test_several_lanes_share_the_reading_of_one_row_group(
    opened: Any, network: Network, server: FaultServer, tmp_path: Path
) -> None:
    server.files["a.parquet"] = parquet(tmp_path / "a.parquet", named(400), 400).read_bytes()
    corpus = opened(server.url("a.parquet"), network=network, cache=0, lanes=8, workers=3)
    server.reset()
    batches(corpus, 10, sequences_per_step=8)
    assert len(server.requests) <= 2
