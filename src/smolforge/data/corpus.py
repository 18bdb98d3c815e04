"""A corpus: the sources of a configuration, resolved, indexed and readable."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smolforge.config import DataConfig
from smolforge.data import index as indexing
from smolforge.data.cache import Cache, ReadAhead
from smolforge.data.fetch import Network
from smolforge.data.holdout import Holdout, decide_holdout
from smolforge.data.order import Order, RowRange, split_into_ranges
from smolforge.data.readers import BadRow, Reader, Row, Rows
from smolforge.data.sources import Context, Source, expand_names
from smolforge.errors import DataError
from smolforge.hub import is_offline


class Address(NamedTuple):
    """Where a document is: source as configured, file in it, row group of the file, row of the group."""

    source: str
    file: str
    row_group: int
    row: int


class Document(NamedTuple):
    """One document, or a piece of a very long one, and where it is; `ends` is False where the next continues it."""

    address: Address
    text: str
    ends: bool = True


class LeftOut(NamedTuple):
    """A row that could not be used: where it is, and why."""

    address: Address
    problem: str


class Corpus:
    """Sources that can be read by address. Made by `open`; a context manager.

    Attributes:
        index: JSON-able: every shard and row group of every source. Equal `index_hash`, equal streams.
        specs, weights, orders: of the sources, in the order of the configuration.
        remote: whether reading uses the network.
    """

    def __init__(
        self, config: DataConfig, index: dict[str, Any], opened: list[tuple[Source, list[Reader]]], context: Context
    ) -> None:
        self.config, self.index, self.index_hash, self._context = config, index, str(index["hash"]), context
        self.specs = list(config.sources)
        self.weights = [float(weight) for weight in config.sources.values()]
        self._readers = [readers for _, readers in opened]
        self._entropies = [source.entropy_bits_per_byte for source, _ in opened]
        self.remote = any(shard.remote for source, _ in opened for shard in source.shards)
        self.orders = []
        for number, entry in enumerate(index["sources"]):
            ranges = split_into_ranges([shard["groups"] for shard in entry["shards"]], config.lanes)
            self.orders.append(Order(ranges, seed=config.seed, source=number, lanes=config.lanes))
        self._trainable: set[int] = set()

    @classmethod
    def open(
        cls, config: DataConfig, *, index: dict[str, Any] | None = None, cache_dir: Path | None = None,
        offline: bool = False, network: Network | None = None,
    ) -> Corpus:  # fmt: skip
        """Resolve the sources and read their index.

        Args:
            index: an earlier `data_index.json`; sources are checked against it and not scanned again.
            cache_dir: folder of the cache where `$SMOLFORGE_CACHE` names none; the user's cache folder unless given.
            offline: use only what is on this machine (also where HF_HUB_OFFLINE is set).

        Raises:
            DataError: a source is missing, empty, damaged, or not what its name says.
            SourceChanged: a source differs from `index`.
            SourceUnavailable: the network did not answer for longer than `data.patience`.
        """
        config = config.model_copy(update={"sources": expand_names(config.sources)})
        context = Context(
            column={"chat": "conversation", "preferences": "pair"}.get(config.format, config.text_column),
            separator=config.separator or None,
            on_error=config.on_error,
            read_ahead=ReadAhead(config.read_ahead),
            offline=offline or is_offline(),
            cache=Cache(cache_dir, config.cache),
            network=network or Network(patience=config.patience),
            format=config.format,
        )
        context.cache.trim()
        try:
            if index is None:
                index, opened = indexing.build_index(list(config.sources), context)
            else:
                opened = indexing.reopen(index, list(config.sources), context)
        except BaseException:
            context.cache.close()
            raise
        return cls(config, index, opened, context)

    @property
    def entropy_bits_per_byte(self) -> float | None:
        """Entropy of the text in bits per byte, known for `tales` alone; None for anything else."""
        known = self._entropies[0]
        return known() if known is not None and len(self._entropies) == 1 else None

    @functools.cached_property
    def holdout(self) -> Holdout:
        """Which documents training never sees; of a small corpus as many are read as it takes to know."""
        sources = [
            (spec, sum(part.rows for part in self.orders[s].ranges), (d.text for d in self.documents_of(s)))
            for s, spec in enumerate(self.specs)
        ]
        return decide_holdout(sources, self.config.holdout, divide=self.config.format == "text")

    def documents(self, *, held_out: bool | None = None) -> Iterator[Document]:
        """All documents in canonical order: those that training never sees (True), those it sees (False), or both."""
        for source in range(len(self.specs)):
            yield from self.documents_of(source, held_out=held_out)

    def texts(self, *, held_out: bool | None = None) -> Iterator[str]:
        """The texts of `parts`, of which long documents are several."""
        return (text for text, _ in self.parts(held_out=held_out))

    def parts(self, *, held_out: bool | None = None) -> Iterator[tuple[str, bool]]:
        """Texts, and whether each ends its document, in pieces where a document is long.

        Sources alternate by weight in characters after each document, so that the first represent the mixture.
        """
        streams = {s: self.documents_of(s, held_out=held_out) for s in range(len(self.specs))}
        drawn = dict.fromkeys(streams, 0)
        while streams:
            source = min(streams, key=lambda s: (drawn[s] / self.weights[s], s))
            document = next(streams[source], None)
            while document is not None:
                drawn[source] += len(document.text)
                yield document.text, document.ends
                if document.ends:
                    break
                document = next(streams[source], None)
            else:
                del streams[source]

    def documents_of(self, source: int, *, held_out: bool | None = None) -> Iterator[Document]:
        """The documents of one source in canonical order; of both sides together, pieces tell what they belong to."""
        for part in self.orders[source].ranges:
            rows = self.read(source, part)
            for number in range(part.rows):
                row = rows(number)
                text = row.text if held_out is None else self.holdout.part(row.text, held_out)
                if text and not text.isspace():
                    yield Document(self.address(source, part, number), text, row.ends or held_out is not None)

    def read(self, source: int, part: RowRange) -> Rows:
        """The rows of a range, numbered from 0. One that cannot be used is an error, or empty with its `problem`."""
        rows = self._readers[source][part.shard].rows(part.group, part.start, part.rows)

        def row(number: int) -> Row:
            try:
                return rows(part.start + number)
            except BadRow as error:
                if self.config.on_error == "fail":
                    raise
                return Row("", problem=error.message)

        return row

    def read_ahead(self, source: int, lane: int, k: int) -> None:
        """Start to fetch a lane's k-th range, where the bound on read-ahead leaves room."""
        if self.remote:
            order = self.orders[source]
            part = order.ranges[order.place(lane, k)[1]]
            self._readers[source][part.shard].read_ahead(part.group)

    def address(self, source: int, part: RowRange, row: int) -> Address:
        """Address of a row of a range."""
        file = self._readers[source][part.shard].shard.name
        return Address(self.specs[source], file, part.group, part.start + row)

    def check_trainable(self, source: int) -> None:
        """Raise DataError where a source has no document to train on."""
        if source in self._trainable:
            return
        if next(self.documents_of(source, held_out=False), None) is None:
            blank = next(self.documents_of(source), None) is None
            why, field = ("blank", "data.sources") if blank else ("held out", "data.holdout")
            hint = "Give it more text" + ("." if blank else ", or set data.holdout=0.")
            raise DataError(f"{self.specs[source]} has no document to train on: all are {why}", field=field, hint=hint)
        self._trainable.add(source)

    def close(self) -> None:
        """Release files, connections and temporary folders."""
        for readers in self._readers:
            for reader in readers:
                reader.close()
        self._context.network.close()
        self._context.read_ahead.close()
        self._context.cache.close()

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
