"""The promises about the stream: exactly once, never held out, the same whatever reads it and however often it
stops."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.conftest import Bytes, batches, configured, digests, is_held_out, jsonl, named, parquet, resumed
from smolforge.data import Corpus, Loader, batch_of_step, data_digest
from smolforge.errors import BadInput, CheckpointError, DataError


def expected_lane(corpus: Corpus, source: int, lane: int, tokens: int) -> list[int]:
    """The lane's stream as the design states it, from the order and a plain reading of all documents."""
    order = corpus.orders[source]
    texts = {d.address[1:]: d.text for d in corpus.documents_of(source)}
    out: list[int] = []
    for k in itertools.count():
        epoch, number = order.place(lane, k)
        piece = order.ranges[number]
        for row in order.rows(epoch, number):
            address = corpus.address(source, piece, int(row))
            text = texts.get(address[1:])
            if text is not None and not is_held_out(text, corpus.config.holdout):
                out += [*Bytes().encode_batch([text])[0], 0]
        if len(out) >= tokens:
            return out[:tokens]
    raise AssertionError


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    """A corpus, a shape, and a way of being interrupted."""
    lanes = draw(st.sampled_from([1, 2, 4, 6]))
    sequences = draw(st.integers(1, 7))
    world = st.integers(1, sequences)
    return {
        "shards": draw(
            st.lists(
                st.tuples(st.integers(1, 40), st.integers(1, 20), st.sampled_from(["parquet", "jsonl", "txt"])),
                min_size=1,
                max_size=4,
            )
        ),
        "lanes": lanes,
        "seed": draw(st.integers(0, 2**31)),
        "holdout": draw(st.sampled_from([0.0, 0.3])),
        "length": draw(st.integers(2, 60)),
        "sequences": sequences,
        "segments": draw(
            st.lists(
                st.tuples(st.integers(0, 4), world, st.sampled_from([0, 0, 1, 3]), st.integers(1, 3)),
                min_size=1,
                max_size=5,
            )
        ),
    }


def write_shards(folder: Path, shards: list[tuple[int, int, str]]) -> None:
    """Documents that all differ, in shards of several formats."""
    for number, (count, group, kind) in enumerate(shards):
        texts = named(count, f"s{number}")
        if kind == "parquet":
            parquet(folder / f"{number}.parquet", texts, group)
        elif kind == "jsonl":
            jsonl(folder / f"{number}.jsonl", texts)
        else:
            (folder / f"{number}.txt").write_text("<|endoftext|>\n".join(texts), encoding="utf-8")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(streams())
def test_any_interrupted_stream_is_the_stated_one(case: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        write_shards(Path(folder), case["shards"])
        keys = {key: case[key] for key in ("lanes", "seed", "holdout")}
        config = configured(folder, sequence_length=case["length"], **keys)
        with Corpus.open(config) as corpus:
            if not any(True for _ in corpus.documents(held_out=False)):
                with pytest.raises(DataError, match="held out"):
                    batches(corpus, 1)
                return
            check_interrupted(corpus, case)


def check_interrupted(corpus: Corpus, case: dict[str, Any]) -> None:
    """Run the segments, each with its own number of ranks and workers, and compare every window."""
    sequences, lanes, width = case["sequences"], case["lanes"], case["length"] + 1
    steps = sum(segment[0] for segment in case["segments"])
    windows = -(-steps * sequences // lanes) + 1
    streams = {lane: expected_lane(corpus, 0, lane, windows * width) for lane in range(lanes)}
    cursor, at = None, 0
    for count, world, workers, prefetch in case["segments"]:
        corpus.config = corpus.config.model_copy(update={"workers": workers, "prefetch": prefetch})
        ranks = [
            Loader(corpus, Bytes(), sequences_per_step=sequences, rank=rank, world=world, cursor=cursor)
            for rank in range(world)
        ]
        made = [list(itertools.islice(loader, count)) for loader in ranks]
        for loader in ranks:
            loader.close()
        for step in range(count):
            parts = [rank[step] for rank in made]
            assert {part.step for part in parts} == {at}
            rows = {i: row for part in parts for (i, _), row in zip(part.digests, part.tokens, strict=True)}
            assert sorted(rows) == list(range(sequences))
            for i, row in rows.items():
                window, lane = divmod(at * sequences + i, lanes)
                assert row.tolist() == streams[lane][window * width : (window + 1) * width]
            at += 1
        if count:
            cursor = resumed([rank[-1].cursor for rank in made])
            assert cursor["step"] == at


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 60), st.integers(1, 17), st.sampled_from([1, 3, 8]), st.integers(0, 99), st.sampled_from([0, 0.4])
)
def test_every_training_document_once_per_epoch(n: int, group: int, lanes: int, seed: int, holdout: float) -> None:
    with TemporaryDirectory() as folder:
        parquet(Path(folder) / "a.parquet", named(n), group)
        with Corpus.open(configured(folder, lanes=lanes, seed=seed, holdout=holdout)) as corpus:
            order = corpus.orders[0]
            for epoch in range(2):
                seen: Counter[str] = Counter()
                for lane in range(lanes):
                    for k in itertools.count():
                        at, number = order.place(lane, k)
                        if at > epoch:
                            break
                        if at == epoch:
                            read = corpus.read(0, order.ranges[number])
                            rows = [read(row) for row in order.rows(at, number).tolist()]
                            seen.update(row.text for row in rows)
                assert seen == Counter(named(n))
        train = {d.text for d in corpus.documents(held_out=False)}
        held = {d.text for d in corpus.documents(held_out=True)}
        assert train | held == set(named(n))
        assert not train & held


def test_held_out_documents_never_reach_a_batch(opened: Any, tmp_path: Path) -> None:
    corpus = opened(parquet(tmp_path / "a.parquet", named(200)), holdout=0.3, lanes=2)
    held = {d.address for d in corpus.documents(held_out=True)}
    assert 30 < len(held) < 90
    fed = {address for batch in batches(corpus, 300) for address in batch.documents}
    assert not fed & held
    assert fed == {d.address for d in corpus.documents(held_out=False)}


def test_equal_texts_share_their_fate_across_sources(opened: Any, tmp_path: Path) -> None:
    one = opened(parquet(tmp_path / "a.parquet", named(300)), holdout=0.1)
    two = opened(jsonl(tmp_path / "b.jsonl", named(300)[::-1]), holdout=0.1, seed=9, lanes=3)
    assert {d.text for d in one.documents(held_out=True)} == {d.text for d in two.documents(held_out=True)} != set()


def test_batches_do_not_depend_on_workers_prefetch_or_container(opened: Any, tmp_path: Path) -> None:
    paths = [parquet(tmp_path / f"{c}.parquet", named(100), 10, compression=c) for c in ("none", "zstd", "snappy")]
    made = [digests(batches(opened(path), 40)) for path in paths]
    assert made[0] == made[1] == made[2]
    for workers, prefetch in ((1, 1), (3, 7)):
        assert digests(batches(opened(paths[0], workers=workers, prefetch=prefetch), 40)) == made[0]
    assert digests(batches(opened(paths[0], seed=1), 40)) != made[0]


def test_document_ids_count_within_the_window_and_change_after_eos(opened: Any, tmp_path: Path) -> None:
    for batch in batches(opened(parquet(tmp_path / "a.parquet", named(50))), 10):
        assert batch.tokens.dtype == batch.document_ids.dtype == np.int32
        assert batch.tokens.shape == batch.document_ids.shape == (4, 33)
        for tokens, ids in zip(batch.tokens, batch.document_ids, strict=True):
            assert ids[0] == 0
            assert np.diff(ids).tolist() == (tokens[:-1] == 0).astype(int).tolist()


def test_a_mixture_keeps_its_weights_whatever_the_length_of_documents(opened: Any, tmp_path: Path) -> None:
    short = parquet(tmp_path / "short.parquet", named(500, "s"))
    long = jsonl(tmp_path / "long.jsonl", ["l" * 5000 for _ in range(40)])
    other = jsonl(tmp_path / "other.jsonl", ["o" * 300 for _ in range(40)])
    corpus = opened((short, 0.7), (long, 0.2), (other, 0.1), holdout=0, lanes=8)
    made = batches(corpus, 50, sequences_per_step=16)
    drawn: Counter[str] = Counter()
    for count, batch in enumerate(made, 1):
        drawn.update(batch.documents[0].source for _ in ())
        for row in batch.tokens:
            kind = Counter(chr(t - 1) for t in row.tolist() if t).most_common(1)[0][0]
            drawn["l" if kind == "l" else "o" if kind == "o" else "s"] += 1
        windows = count * 16
        for name, share in (("s", 0.7), ("l", 0.2), ("o", 0.1)):
            assert abs(drawn[name] - share * windows) <= 8  # one window per lane
    cursor = json.loads(json.dumps(made[19].cursor))
    assert digests(batches(corpus, 30, sequences_per_step=16, cursor=cursor)) == digests(made)[20:]


def test_skipped_steps_leave_the_others_as_they_were(opened: Any, tmp_path: Path) -> None:
    corpus = opened(parquet(tmp_path / "a.parquet", named(100)), lanes=8)
    plain = batches(corpus, 12, sequences_per_step=4)
    for workers in (0, 2):
        kept = batches(corpus, 6, sequences_per_step=4, skip_steps=[(5, 7), (2, 6)], workers=workers)
        assert [b.step for b in kept] == [0, 1, 7, 8, 9, 10]
        assert digests(kept) == [digests(plain)[b.step] for b in kept]
        again = batches(corpus, 4, sequences_per_step=4, cursor=resumed([kept[1].cursor]), skip_steps=[(2, 7)])
        assert [b.step for b in again] == [7, 8, 9, 10]
        assert again[0].cursor == plain[7].cursor == kept[2].cursor


def test_which_names_the_documents_that_fed_a_step(opened: Any, tmp_path: Path) -> None:
    corpus = opened(parquet(tmp_path / "a.parquet", named(100)), (jsonl(tmp_path / "b.jsonl", named(50, "b")), 0.5))
    made = batches(corpus, 12)
    texts = {d.address: d.text for d in corpus.documents()}
    for cursor, step in ((None, 0), (None, 9), (made[3].cursor, 4), (made[3].cursor, 11)):
        named_documents = batch_of_step(corpus, Bytes(), cursor, step, sequences_per_step=4).documents
        assert named_documents == made[step].documents
        for row in made[step].tokens:
            text = bytes(t - 1 if t else 10 for t in row.tolist()).decode()
            assert any(text.split("\n")[0] in texts[address] for address in named_documents)
    with pytest.raises(BadInput, match="before the cursor"):
        batch_of_step(corpus, Bytes(), made[3].cursor, 3, sequences_per_step=4)


def test_a_corpus_smaller_than_its_lanes_feeds_every_lane(opened: Any, tmp_path: Path) -> None:
    corpus = opened(parquet(tmp_path / "a.parquet", ["only one document, but a good one"]), lanes=16, holdout=0)
    batch = batches(corpus, 3, sequences_per_step=16)[-1]
    assert batch.tokens.shape == (16, 33)


def test_a_foreign_or_damaged_cursor_is_refused(opened: Any, tmp_path: Path) -> None:
    corpus = opened(parquet(tmp_path / "a.parquet", named(100)))
    cursor = batches(corpus, 2)[-1].cursor
    for change in (
        {"index": "another"},
        {"seed": 5},
        {"lane_count": 8},
        {"version": 9},
        {"step": -1},
        {"step": True},
        {"lanes": {"0": [[0, 0, 0, 0]], "x": []}},
        {"lanes": {str(lane): [[0, -1, 0, 0]] for lane in range(4)}},
        {"lanes": {str(lane): [[0, 0, 0, 0], [0, 0, 0, 0]] for lane in range(4)}},
        {"lanes": {str(lane): [[0, 0, 9999, 0]] for lane in range(4)}},
        {"lanes": None},
    ):
        with pytest.raises(CheckpointError):
            batches(corpus, 1, cursor={**cursor, **change})
    with pytest.raises(BadInput, match="lacks lanes"):
        batches(corpus, 1, cursor={**cursor, "lanes": {"0": cursor["lanes"]["0"]}})


@pytest.mark.parametrize("world", [3, 7, 64])
def test_any_number_of_ranks_reads_what_one_does(opened: Any, tmp_path: Path, world: int) -> None:
    corpus = opened(parquet(tmp_path / "a.parquet", named(200), 20), lanes=16)
    shape = {"sequences_per_step": 80, "workers": 0}
    alone = digests(batches(corpus, 4, **shape))
    ranks = [batches(corpus, 4, rank=rank, world=world, **shape) for rank in range(world)]
    assert [
        data_digest([pair for part in parts for pair in part.digests]) for parts in zip(*ranks, strict=True)
    ] == alone
    cursor = resumed([made[1].cursor for made in ranks])
    assert cursor == batches(corpus, 2, **shape)[-1].cursor
    assert digests(batches(corpus, 2, cursor=cursor, **shape)) == alone[2:]


def test_more_ranks_than_sequences_are_refused(opened: Any, tmp_path: Path) -> None:
    corpus = opened(parquet(tmp_path / "a.parquet", named(10)))
    for keys in ({"world": 3, "sequences_per_step": 2}, {"rank": 1}, {"sequences_per_step": 0},
                 {"skip_steps": [(3, 3)]}):  # fmt: skip
        with pytest.raises(BadInput):
            batches(corpus, 1, **keys)


def test_tales_streams_without_files(opened: Any) -> None:
    corpus = opened("tales", lanes=4)
    assert corpus.entropy_bits_per_byte == pytest.approx(corpus.entropy_bits_per_byte)
    assert 0 < corpus.entropy_bits_per_byte < 8
    made = batches(corpus, 6)
    assert digests(batches(corpus, 3, cursor=resumed([made[2].cursor]))) == digests(made)[3:]
    assert corpus.index["sources"][0]["rows"] == 2**20
    held = list(itertools.islice(corpus.documents(held_out=True), 2))
    assert [d.address.source for d in held] == ["tales", "tales"]
    address = made[0].documents[0]
    from smolforge import tales

    text = tales.document(address.row_group * 512 + address.row).text
    assert bytes(t - 1 for t in made[0].tokens[0].tolist() if t).decode("utf-8", "ignore")[:20] == text[:20]
