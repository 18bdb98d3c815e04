"""A corpus: the sources of a configuration, resolved, indexed and readable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolforge.config import DataConfig
from smolforge.data import index as indexing
from smolforge.data.cache import Cache
from smolforge.data.document import Address, Document, is_blank, is_held_out
from smolforge.data.network import Network, is_offline
from smolforge.data.order import Order, RowRange, cut
from smolforge.data.readahead import ReadAhead
from smolforge.data.shard import Context, Rows
from smolforge.errors import DataError


class Corpus:
    """Sources that can be read by address. Made by `open`; a context manager.

    Attributes:
        config: the `DataConfig` it was opened with.
        index: JSON-able: every shard and row group of every source, and the hash of all.
        weights: of the sources, in the order of the configuration.
        remote: whether reading asks the network.
    """

    def __init__(self, config: DataConfig, index: dict[str, Any], opened: list[Any], context: Context) -> None:
        self.config, self.index, self._context = config, index, context
        self.specs = list(config.sources)
        self.weights = [float(weight) for weight in config.sources.values()]
        self._formats = [formats for _, formats in opened]
        self._entropies = [source.entropy_bits_per_byte for source, _ in opened]
        self.remote = any(shard.remote for source, _ in opened for shard in source.shards)
        self._orders = [
            Order(
                cut([shard["groups"] for shard in entry["shards"]], config.lanes),
                seed=config.seed,
                source=number,
                lanes=config.lanes,
            )
            for number, entry in enumerate(index["sources"])
        ]
        self._trainable: set[int] = set()

    @classmethod
    def open(
        cls,
        config: DataConfig,
        *,
        index: dict[str, Any] | None = None,
        cache_dir: Path | None = None,
        offline: bool = False,
        network: Network | None = None,
    ) -> Corpus:
        """Resolve the sources and read their index.

        Args:
            config: the data section of a run's configuration.
            index: an earlier `data_index.json`; sources are checked against it and not scanned again.
            cache_dir: folder of the cache; `$SMOLFORGE_CACHE` or the user's cache folder unless given.
            offline: use only what is on this machine (also where HF_HUB_OFFLINE is set).
            network: how the network is asked and waited for; made from the configuration unless given.

        Raises:
            DataError: a source is missing, empty, damaged, or not what its name says.
            SourceChanged: a source differs from `index`.
            SourceUnavailable: the network stayed away for longer than `data.patience`.
        """
        offline = offline or is_offline()
        context = Context(
            column=config.text_column,
            separator=config.separator or None,
            read_ahead=ReadAhead(config.read_ahead),
            offline=offline,
            cache=Cache(cache_dir, config.cache),
            network=network or Network(patience=config.patience),
        )
        context.cache.trim()
        try:
            if index is None:
                index, opened = indexing.build(list(config.sources), context)
            else:
                opened = indexing.reopen(index, list(config.sources), context)
        except BaseException:
            context.cache.close()
            raise
        return cls(config, index, opened, context)

    @property
    def index_hash(self) -> str:
        """Hash of the index: equal hashes, equal streams."""
        return self.index["hash"]

    @property
    def entropy_bits_per_byte(self) -> float | None:
        """Entropy of the text in bits per byte, known for `tales` alone; None for anything else."""
        known = self._entropies[0]
        return known() if known is not None and len(self._entropies) == 1 else None

    def documents(self, *, held_out: bool | None = None) -> Iterator[Document]:
        """All documents in canonical order, once, read as they are asked for.

        Args:
            held_out: only those that training never sees (True), only those it sees (False), or both (None).
        """
        for source in range(len(self.specs)):
            yield from self.documents_of(source, held_out=held_out)

    def texts(self, *, held_out: bool | None = None) -> Iterator[str]:
        """The texts of `documents`, the sources alternating so that each one's characters keep to its weight.

        The first texts represent the mixture: a tokenizer is trained on them, an evaluation measures them.
        """
        streams = {s: self.documents_of(s, held_out=held_out) for s in range(len(self.specs))}
        drawn = dict.fromkeys(streams, 0)
        while streams:
            source = min(streams, key=lambda s: (drawn[s] / self.weights[s], s))
            document = next(streams[source], None)
            if document is None:
                del streams[source]
                continue
            drawn[source] += len(document.text)
            yield document.text

    def documents_of(self, source: int, *, held_out: bool | None = None) -> Iterator[Document]:
        """The documents of one source in canonical order."""
        share = self.config.holdout
        for piece in self._orders[source].slices:
            rows = self.read(source, piece)
            for begin in range(0, piece.rows, 64):
                numbers = list(range(begin, min(begin + 64, piece.rows)))
                for number, row in zip(numbers, rows.take(numbers), strict=True):
                    if is_blank(row.text) or (held_out is not None and is_held_out(row.text, share) != held_out):
                        continue
                    yield Document(*self.address(source, piece, number), row.text)

    # -- for lanes

    def order(self, source: int) -> Order:
        """The order of one source."""
        return self._orders[source]

    def read(self, source: int, piece: RowRange) -> Rows:
        """The rows of a slice, numbered from 0."""
        format = self._formats[source][piece.shard]
        rows = format.rows(piece.group, piece.start, piece.rows)
        return rows if not piece.start else _Shifted(rows, piece.start)

    def ahead(self, source: int, lane: int, k: int) -> None:
        """Begin to fetch a lane's k-th slice, where the bound on read-ahead leaves room."""
        if self.remote:
            order = self._orders[source]
            piece = order.slices[order.place(lane, k)[1]]
            self._formats[source][piece.shard].ahead(piece.group)

    def address(self, source: int, piece: RowRange, row: int) -> Address:
        """Address of a row of a slice."""
        file = self._formats[source][piece.shard].shard.name
        return Address(self.specs[source], file, piece.group, piece.start + row)

    def check_trainable(self, source: int) -> None:
        """Make sure that a source has a document to train on.

        Raises:
            DataError: all its documents are held out or blank.
        """
        if source in self._trainable:
            return
        if next(self.documents_of(source, held_out=False), None) is None:
            blank = next(self.documents_of(source), None) is None
            raise DataError(
                f"{self.specs[source]} has no document to train on: "
                + ("all are blank" if blank else "all are held out"),
                field="data.sources" if blank else "data.holdout",
                hint="Give it more text" + ("." if blank else ", or set data.holdout=0."),
            )
        self._trainable.add(source)

    def close(self) -> None:
        """Let go of files, connections and temporary folders."""
        for formats in self._formats:
            for format in formats:
                format.close()
        self._context.network.close()
        self._context.read_ahead.close()
        self._context.cache.close()

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Shifted:
    def __init__(self, rows: Rows, start: int) -> None:
        self.rows, self.start = rows, start

    def take(self, rows: Any) -> Any:
        return self.rows.take([row + self.start for row in rows])
