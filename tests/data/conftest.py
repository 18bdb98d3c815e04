"""Shared by the tests of the stream: a tokenizer without a vocabulary, and a network that does not sleep."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faults.server import FaultServer
from smolforge.config import DataConfig
from smolforge.data import Batch, Corpus, Loader, Network, data_digest, merge_cursors
from smolforge.data.holdout import Holdout

Logged = Callable[[], list[str]]


class Bytes:
    """One token per byte, EOS is 0."""

    eos_id = 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Each byte plus one."""
        return [[byte + 1 for byte in text.encode()] for text in texts]


def is_held_out(text: str, share: float) -> bool:
    """Whether the hash of a text puts it among the `share` that training never sees."""
    return Holdout(share).part(text, held_out=True) == text


class Clock:
    """Time that passes only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        """Pass without waiting."""
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    """Time under control."""
    return Clock()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    """The messages that the code has logged so far."""
    caplog.set_level(logging.INFO, logger="smolforge")
    return lambda: list(caplog.messages)


@pytest.fixture
def network(clock: Clock) -> Network:
    """A network that waits on `clock`."""
    return Network(patience=900, timeout=5, sleep=clock.sleep, clock=lambda: clock.now, jitter=lambda: 1.0)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A server that misbehaves when asked to."""
    with FaultServer() as running:
        yield running


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Corpus]]:
    """Opens corpora with their cache in the test's folder, and closes them."""
    corpora: list[Corpus] = []

    def open_one(*sources: Any, index: Any = None, offline: bool = False, network: Any = None, **keys: Any) -> Corpus:
        config = configured(*sources, **keys)
        corpus = Corpus.open(config, index=index, cache_dir=tmp_path / "cache", offline=offline, network=network)
        corpora.append(corpus)
        return corpus

    yield open_one
    for corpus in corpora:
        corpus.close()


def configured(*sources: Any, **keys: Any) -> DataConfig:
    """A small data configuration over paths or (path, weight) pairs."""
    weighted = {str(s[0]): s[1] for s in sources if isinstance(s, tuple)}
    weighted |= {str(s): 1.0 for s in sources if not isinstance(s, tuple)}
    return DataConfig(**{"sequence_length": 32, "lanes": 4, "workers": 0, "sources": weighted, **keys})


def parquet(path: Path, texts: list[str], group: int = 10, **keys: Any) -> Path:
    """Write texts as parquet with a second column beside them."""
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=group, **keys)
    return path


def jsonl(path: Path, texts: list[str]) -> Path:
    """Write texts as jsonl."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def named(n: int, prefix: str = "doc", words: int = 12) -> list[str]:
    """n documents of different lengths that tell their number."""
    return [f"{prefix} {i} " + "ab " * (i * 7 % words) for i in range(n)]


def batches(corpus: Corpus, count: int, **keys: Any) -> list[Batch]:
    """The first batches of a loader."""
    with Loader(corpus, Bytes(), **{"sequences_per_step": 4, **keys}) as loader:
        return list(itertools.islice(loader, count))


def digests(made: list[Batch]) -> list[str]:
    """Of one rank that is alone."""
    return [data_digest(batch.digests) for batch in made]


def resumed(cursors: list[dict[str, Any]]) -> dict[str, Any]:
    """The merged cursor after a trip through JSON."""
    return json.loads(json.dumps(merge_cursors(cursors)))
