"""Files behind any protocol of fsspec, through a filesystem that fails in the ways of a network."""

from __future__ import annotations

import gzip
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data.conftest import Clock, Logged, batches, digests, jsonl, named, parquet
from smolforge.data import Network
from smolforge.errors import DataError, SourceChanged, SourceUnavailable


class Flaky(MemoryFileSystem):
    """memory:// whose ranges meet `faults`, one after the other."""

    protocol = "flaky"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    faults: list[Exception | int] = []  # noqa: RUF012
    reads = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        type(self).reads += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        data = super().cat_file(path, start, end)
        return data[:fault] if fault is not None else data


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """URL of a folder with two parquet shards and a compressed jsonl, also at `tmp_path / "local"`."""
    local = tmp_path / "local"
    local.mkdir()
    parquet(local / "a.parquet", named(60), 10)
    parquet(local / "b.parquet", named(30, "b"), 10)
    (local / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "c.jsonl", named(20, "c")).read_bytes()))
    (local / "notes.bin").write_text("no data")
    url = f"flaky://{uuid.uuid4().hex}"
    Flaky.faults.clear()
    filesystem = Flaky()
    for path in local.iterdir():
        filesystem.pipe_file(f"{url}/{path.name}", path.read_bytes())
    yield url
    filesystem.rm(url, recursive=True)


def test_a_folder_a_glob_and_a_file_give_the_stream_of_local_files(
    opened: Any, network: Network, bucket: str, tmp_path: Path
) -> None:
    for spec in ("", "/*.parquet", "/a.parquet", "/*.jsonl.gz"):
        truth = digests(batches(opened(f"{tmp_path / 'local'}{spec}"), 12))
        for workers in (0, 2):
            assert digests(batches(opened(bucket + spec, network=network, workers=workers), 12)) == truth


def test_faults_are_retried_and_short_ranges_completed(
    opened: Any, network: Network, bucket: str, tmp_path: Path, clock: Clock, logged: Logged
) -> None:
    truth = digests(batches(opened(tmp_path / "local" / "a.parquet"), 12))
    Flaky.faults += [ConnectionResetError("reset"), TimeoutError(), 5, OSError("Service Unavailable"), 0]
    assert digests(batches(opened(f"{bucket}/a.parquet", network=network, cache=0), 12)) == truth
    assert len(clock.slept) == 5
    assert any("ConnectionResetError" in line for line in logged())
    Flaky.faults += [OSError("away")] * 1000
    with pytest.raises(SourceUnavailable, match="could not reach flaky:// for 9"):
        opened(f"{bucket}/a.parquet", network=network, cache=0)


def test_refusals_end_at_once(opened: Any, network: Network, bucket: str, clock: Clock) -> None:
    for fault, said in ((PermissionError("no"), "credentials"), (ValueError("odd"), "ValueError: odd")):
        Flaky.faults[:] = [fault]
        with pytest.raises(DataError, match=said):
            opened(f"{bucket}/a.parquet", network=network, cache=0)
    with pytest.raises(DataError, match="no such file"):
        opened(f"{bucket}/nothing.parquet", network=network)
    with pytest.raises(DataError, match="unknown ending"):
        opened(f"{bucket}/notes.bin", network=network)
    with pytest.raises(DataError, match="matches no file"):
        opened(f"{bucket}/*.txt", network=network)
    assert clock.slept == []


def test_the_cache_serves_a_second_run_and_a_change_is_named(opened: Any, network: Network, bucket: str) -> None:
    corpus = opened(bucket, network=network)
    truth = digests(batches(corpus, 20))
    before = Flaky.reads
    for offline in (False, True):
        again = opened(bucket, network=network, index=corpus.index, offline=offline)
        assert digests(batches(again, 20)) == truth
    assert Flaky.reads == before
    with pytest.raises(DataError, match="must not be used"):
        opened(bucket, network=network, offline=True)
    Flaky().pipe_file(f"{bucket}/b.parquet", Flaky().cat_file(f"{bucket}/a.parquet"))
    with pytest.raises(SourceChanged, match=r"b.parquet changed: its size was"):
        opened(bucket, network=network, index=corpus.index)


def test_a_missing_package_is_named(opened: Any, network: Network) -> None:
    for protocol, package in (("az", "adlfs"), ("oss", "ossfs"), ("smb", "smbprotocol")):
        with pytest.raises(DataError, match=f"pip install {package}"):
            opened(f"{protocol}://container/a.parquet", network=network)
    with pytest.raises(DataError, match=r"cannot open nothing://x/a.parquet"):
        opened("nothing://x/a.parquet", network=network)
