"""A stream over HTTP that is dropped, refused, slowed and lied to is the same stream, or one clear error."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.conftest import Bytes, Clock, Logged, batches, digests, jsonl, named, parquet, resumed
from faults.server import Drop, FaultServer, Flip, Length, NoRanges, Slow, Status, every, first
from smolforge.data import Loader, Network
from smolforge.data.fetch import Trouble, retry_after
from smolforge.errors import DataError, SourceChanged, SourceUnavailable

FAULTS = {
    "every third request dropped": every(3, Drop(after=0)),
    "every second body dropped": every(2, Drop(after=37)),
    "503": first(5, Status(503), Status(500), Status(502)),
    "429": first(3, Status(429, {"Retry-After": "7"})),
    "408": first(2, Status(408)),
    "too long announced": first(3, Length(wrong_by=50)),
    "too short announced": first(3, Length(wrong_by=-20)),
    "one bit flipped": first(2, Flip(at=150), of="files"),
    "slow": first(2, Slow(pause=0.001, chunk=64)),
    "no ranges": lambda _: NoRanges(),
}


@pytest.fixture
def remote(server: FaultServer, tmp_path: Path) -> str:
    """URL of a parquet shard of 12 row groups."""
    server.files["a.parquet"] = parquet(tmp_path / "a.parquet", named(120), 10).read_bytes()
    return server.url("a.parquet")


@pytest.fixture
def truth(opened: Any, remote: str, tmp_path: Path) -> list[str]:
    """The digests of the same shard read from disk."""
    return digests(batches(opened(tmp_path / "a.parquet"), 30))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("workers", [0, 3])
def test_a_faulty_network_gives_the_same_stream(
    opened: Any, network: Network, server: FaultServer, remote: str, truth: list[str], fault: str, workers: int
) -> None:
    if fault == "one bit flipped":
        corpus = opened(remote, network=network, workers=workers)  # an honest footer, then a hurt row group
        server.fault = FAULTS[fault]
    else:
        server.fault = FAULTS[fault]
        corpus = opened(remote, network=network, workers=workers)
    assert digests(batches(corpus, 30)) == truth


@pytest.mark.parametrize("name", ["b.jsonl", "b.txt"])
def test_files_without_ranges_of_their_own_are_fetched_once(
    opened: Any, network: Network, server: FaultServer, tmp_path: Path, name: str
) -> None:
    if name == "b.txt":
        (tmp_path / name).write_text("<|endoftext|>".join(named(90)))
    else:
        jsonl(tmp_path / name, named(90))
    truth = digests(batches(opened(tmp_path / name), 10))
    server.files[name] = (tmp_path / name).read_bytes()
    for cache in (1 << 20, 0):
        server.fault = first(4, Drop(after=100), Status(503))
        corpus = opened(server.url(name), network=network, cache=cache)
        assert digests(batches(corpus, 10)) == truth
    server.fault = lambda _: NoRanges()
    assert digests(batches(opened(server.url(name), network=network, cache=0), 10)) == truth
    server.reset()
    corpus = opened(server.url(name), network=network, cache=1 << 20)
    assert digests(batches(corpus, 10)) == truth
    assert sum(request.sent for request in server.requests) < 10_000  # from the cache, but for a look at the ETag


def test_waits_grow_with_jitter_and_honour_retry_after(
    opened: Any, network: Network, server: FaultServer, remote: str, clock: Clock, logged: Logged
) -> None:
    server.fault = first(6, Status(503))
    opened(remote, network=network)
    assert clock.slept == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    clock.slept.clear()
    network.jitter = lambda: 0.0
    server.fault = first(3, Status(429, {"Retry-After": "30"}))
    opened(remote, network=network, cache=0)
    assert clock.slept == [30.0, 30.0, 30.0]
    assert sum(": 503 " in line for line in logged()) == 1
    assert sum(": 429 " in line for line in logged()) == 1
    assert all(remote.split("/")[2] in line for line in logged())


def test_patience_ends_and_says_so(
    opened: Any, network: Network, server: FaultServer, remote: str, clock: Clock
) -> None:
    corpus = opened(remote, network=network, cache=0)
    for workers in (0, 2):
        server.fault = lambda _: Status(503)
        before = clock.now
        with pytest.raises(SourceUnavailable, match="503") as caught:
            batches(corpus, 1, workers=workers)
        assert caught.value.exit_code == 75
        assert 900 <= clock.now - before <= 900 * 5  # each of the threads that asked has waited once
    server.fault = lambda _: Status(429, {"Retry-After": "86400"})
    before = clock.now
    with pytest.raises(SourceUnavailable, match="86400"):
        batches(opened(remote, network=network), 1)
    assert clock.now == before  # waiting would have been in vain


def test_bytes_that_come_begin_the_patience_anew(
    opened: Any, network: Network, server: FaultServer, remote: str, truth: list[str]
) -> None:
    network.patience = 3.0
    server.fault = lambda _: Drop(after=40)
    assert digests(batches(opened(remote, network=network, cache=0), 3)) == truth[:3]


@pytest.mark.parametrize(
    ("code", "said"), [(404, "404"), (403, "HF_TOKEN"), (401, "HF_TOKEN"), (400, "400"), (451, "451")]
)
def test_refusals_are_errors_at_once(
    opened: Any, network: Network, server: FaultServer, remote: str, clock: Clock, code: int, said: str
) -> None:
    server.fault = lambda _: Status(code)
    with pytest.raises(DataError, match=said):
        opened(remote, network=network)
    assert clock.slept == []


def test_a_host_that_is_not_there(opened: Any, network: Network) -> None:
    network.patience = 20
    with pytest.raises(SourceUnavailable, match="could not reach"):
        opened("http://127.0.0.1:9/a.parquet", network=network)
    with pytest.raises(DataError, match="unknown ending"):
        opened("http://127.0.0.1:9/a.bin", network=network)


def test_a_shard_that_changes_under_the_run_is_named(
    opened: Any, network: Network, server: FaultServer, remote: str
) -> None:
    content = server.files["a.parquet"]
    corpus = opened(remote, network=network, cache=0)
    batches(corpus, 1)
    server.files["a.parquet"] = content[:100] + b"?" + content[101:]
    with pytest.raises(SourceChanged, match=r"a.parquet changed(.|\n)*ETag"):
        batches(corpus, 20)
    server.files["a.parquet"] = content + b"?"
    server.etags["a.parquet"] = corpus.index["sources"][0]["shards"][0]["identity"]["etag"]
    with pytest.raises(SourceChanged, match="size was"):
        batches(corpus, 20)


def test_a_changed_url_is_refused_on_resume(opened: Any, network: Network, server: FaultServer, remote: str) -> None:
    index = opened(remote, network=network).index
    assert opened(remote, network=network, index=index).index == index
    server.etags["a.parquet"] = '"another"'
    with pytest.raises(SourceChanged, match="its etag was"):
        opened(remote, network=network, index=index)
    server.files["a.parquet"] += b"x"
    with pytest.raises(SourceChanged, match="its size was"):
        opened(remote, network=network, index=index)


def test_offline_uses_the_cache_and_names_what_is_missing(
    opened: Any, network: Network, server: FaultServer, remote: str, truth: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="must not be used"):
        opened(remote, network=network, offline=True)
    corpus = opened(remote, network=network)
    assert digests(batches(corpus, 30)) == truth
    server.reset()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert digests(batches(opened(remote, network=network, index=corpus.index), 30)) == truth
    with pytest.raises(DataError, match=r"a.parquet: bytes .* not on this machine"):
        batches(opened(remote, network=network, index=corpus.index, cache=0), 1)
    assert server.requests == []


def test_the_cache_serves_a_second_run_and_stays_within_its_bound(
    opened: Any, network: Network, server: FaultServer, remote: str, truth: list[str], tmp_path: Path
) -> None:
    corpus = opened(remote, network=network)
    assert digests(batches(corpus, 30)) == truth
    server.reset()
    assert digests(batches(opened(remote, network=network, index=corpus.index), 30)) == truth
    assert server.sent <= 1  # a look at the ETag
    for kept in (tmp_path / "cache").rglob("*.range"):  # torn by another process or a crash
        kept.write_bytes(kept.read_bytes()[:-1])
    assert digests(batches(opened(remote, network=network, index=corpus.index), 30)) == truth
    small = opened(remote, network=network, cache=3000)
    assert digests(batches(small, 30)) == truth
    assert sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file()) <= 3000 + 1500


def test_only_the_text_column_is_fetched_in_one_range_per_row_group(
    opened: Any, network: Network, server: FaultServer, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    table = pa.table({
        "noise": [rng.bytes(4000) for _ in range(64)],
        "text": named(64),
        "more": [rng.bytes(4000) for _ in range(64)],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "wide.parquet", row_group_size=8)
    server.files["wide.parquet"] = (tmp_path / "wide.parquet").read_bytes()
    corpus = opened(server.url("wide.parquet"), network=network, cache=0)
    server.reset()
    assert [d.text for d in corpus.documents()] == named(64)
    assert len(server.requests) == 8
    assert server.sent < len(server.files["wide.parquet"]) / 50


def test_read_ahead_stays_within_its_bound(opened: Any, network: Network, server: FaultServer, tmp_path: Path) -> None:
    texts = [f"{i} " + "x" * 3000 for i in range(400)]
    server.files["a.parquet"] = parquet(
        tmp_path / "a.parquet", texts, 100, compression="none", use_dictionary=False
    ).read_bytes()
    corpus = opened(server.url("a.parquet"), network=network, cache=0, workers=2, lanes=4, read_ahead=1 << 20)
    held = corpus._context.read_ahead
    most = 0
    with Loader(corpus, Bytes(), sequences_per_step=4) as loader:
        for _ in range(30):
            next(loader)
            most = max(most, held._held)
    assert most <= 1 << 20


def test_a_deep_resume_reads_under_one_percent_of_a_million_rows(
    opened: Any, network: Network, server: FaultServer, tmp_path: Path
) -> None:
    rows, width = 1_000_000, 100
    letters = np.frombuffer(np.random.default_rng(0).bytes(rows * width), dtype=np.uint8) % 26 + 97
    offsets = pa.py_buffer((np.arange(rows + 1, dtype=np.int32) * width).tobytes())
    column = pa.Array.from_buffers(pa.string(), rows, [None, offsets, pa.py_buffer(letters.tobytes())])
    path = tmp_path / "million.parquet"
    table = pa.table({"text": column, "prompt": column})
    pq.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False, write_statistics=False)
    server.files["million.parquet"] = path.read_bytes()
    size = path.stat().st_size
    keys = {"lanes": 16, "sequence_length": 512, "cache": 0, "network": network}
    corpus = opened(server.url("million.parquet"), **keys)
    # A cursor far into the stream, as a run of days would leave it: some rows into each lane's 61st row group.
    cursor = batches(corpus, 1, sequences_per_step=16)[0].cursor
    lanes = {lane: [[60, 100 + 5 * int(lane), 7, 60 * 500 * 101]] for lane in cursor["lanes"]}
    cursor = {**cursor, "step": 5917, "lanes": lanes}
    for workers in (0, 2):
        server.reset()
        again = opened(server.url("million.parquet"), index=corpus.index, workers=workers, **keys)
        first_batch = batches(again, 1, sequences_per_step=16, cursor=cursor)[0]
        assert first_batch.step == 5917
        ranges = {request.range for request in server.requests}
        print(f"workers {workers}: {server.sent:,} of {size:,} bytes, {server.sent / size:.3%}, {len(ranges)} ranges")
        assert server.sent < size / 100
        assert len(ranges) == 16 + 3  # one row group per lane, the footer in two parts, a look at size and ETag


def test_waiting_for_a_silent_network_can_be_polled_and_ended(opened: Any, server: FaultServer, remote: str) -> None:
    asleep, wake = threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        asleep.set()
        wake.wait(10)

    for workers in (0, 2):
        asleep.clear()
        wake.clear()
        server.fault = None
        corpus = opened(remote, network=Network(patience=900, sleep=sleep), cache=0)
        server.fault = lambda _: Status(503)
        with Loader(corpus, Bytes(), sequences_per_step=4, workers=workers) as loader:
            assert not loader.wait(0.01)
            assert asleep.wait(10)
            assert not loader.wait(0.01)
            server.fault = None
            wake.set()
            while not loader.wait(0.5):
                pass
            assert next(loader).step == 0


def test_an_error_in_a_thread_reaches_the_consumer_after_the_batches_before_it(
    opened: Any, network: Network, server: FaultServer, remote: str, truth: list[str]
) -> None:
    network.patience = 0
    corpus = opened(remote, network=network, cache=0, workers=2, prefetch=1)
    with Loader(corpus, Bytes(), sequences_per_step=4) as loader:
        made = [next(loader)]
        server.fault = lambda _: Status(503)
        with pytest.raises(SourceUnavailable):
            while True:
                assert loader.wait(10)
                made.append(next(loader))
    assert digests(made) == truth[: len(made)]
    server.fault = None
    network.patience = 900
    after = batches(corpus, 3, cursor=resumed([made[-1].cursor]))  # the run was saved and goes on
    assert digests(after) == truth[len(made) : len(made) + 3]


def test_attempt_gives_up_only_on_trouble(network: Network) -> None:
    tries = []

    def fails() -> None:
        tries.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        network.attempt("here", "this", fails)
    assert len(tries) == 1

    def troubled() -> None:
        raise Trouble("x")

    network.close()
    with pytest.raises(SourceUnavailable, match="stopped while"):
        network.attempt("here", "this", troubled)


def test_retry_after_in_both_spellings() -> None:
    assert retry_after({"retry-after": "120"}) == 120
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert (retry_after({"retry-after": "Wed, 21 Oct 2065 07:28:00 GMT"}) or 0) > 3e8
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None
