"""One lane: documents in the lane's order, joined by EOS, cut into windows of L+1 tokens.

A lane is a pure function of its cursor. In a mixture each window is filled from one source, the one furthest
behind its weight in tokens, so the shares of a lane stay within one window of the weights whatever the length of
the documents; a phase per lane keeps the lanes from turning to the same source all at once. Documents are
tokenized in the order they will be used, some 256 kB of text per `encode_batch`: one call per whole row group
would hold gigabytes of Python integers over 16 lanes, and would tokenize what a resumed lane is already past.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from smolforge.data.cursor import LaneCursor, Position
from smolforge.data.document import Address, is_blank, is_held_out
from smolforge.data.order import RowRange, permutation
from smolforge.data.shard import Rows
from smolforge.errors import CheckpointError

if TYPE_CHECKING:
    from smolforge.data.corpus import Corpus

ENCODE_BYTES = 256 << 10
MAX_ENCODE_ROWS = 512


class Encoder(Protocol):
    """What a lane needs of a tokenizer."""

    @property
    def eos_id(self) -> int: ...

    def encode_batch(self, texts: list[str], /) -> list[list[int]]: ...


@dataclass
class Window:
    """L+1 tokens of a lane, int32, the number of the document of each, and the lane's cursor after them."""

    tokens: np.ndarray
    document_ids: np.ndarray
    documents: list[Address]
    cursor: list[list[int]]


class LaneSource:
    """The stream of one source in one lane, from a position on."""

    def __init__(
        self, corpus: Corpus, encoder: Encoder, source: int, lane: int, position: Position, ahead: bool
    ) -> None:
        self.corpus, self.encoder, self.ahead = corpus, encoder, ahead
        self.source, self.lane, self.position = source, lane, position
        self._slice: tuple[int, Any, np.ndarray] | None = None  # number, rows, order
        self._encoded: deque[tuple[int, np.ndarray]] = deque()  # (row in order, tokens), ascending
        self._until = 0  # rows before this one are encoded or passed over
        self._hinted = 0  # slices before this one were asked for
        self._document: tuple[np.ndarray, Address] | None = None  # the one that the position is in

    def take(self, length: int) -> tuple[list[np.ndarray], list[Address]]:
        """The next `length` tokens, in parts of one document each, and the documents' addresses.

        Raises:
            SmolforgeError: the source is damaged, changed or away; the position lies past its document.
        """
        at = self.position
        parts: list[np.ndarray] = []
        addresses: list[Address] = []
        missing = length
        while missing:
            if self._document is None:
                self._document = self._next()
            tokens, address = self._document
            if at.offset > len(tokens):
                raise CheckpointError(
                    f"the data cursor stands at token {at.offset} of a document of {len(tokens)}: {address}",
                    field="tokenizer",
                    hint="The tokenizer is not the one that the run was made with.",
                )
            part = tokens[at.offset : at.offset + missing]
            parts.append(part)
            addresses.append(address)
            missing -= len(part)
            at.offset += len(part)
            if at.offset == len(tokens):
                at.row, at.offset, self._document = at.row + 1, 0, None
        at.drawn += length
        return parts, addresses

    def _next(self) -> tuple[np.ndarray, Address]:
        """Tokens (with EOS) and address of the training document at the position or the next one after it."""
        barren = 0
        while True:
            number, rows, order = self._open()
            piece = self.corpus.order(self.source).slices[number]
            while self.position.row < len(order):
                if self.position.row >= self._until:
                    self._encode(piece, rows, order)
                while self._encoded and self._encoded[0][0] < self.position.row:
                    self._encoded.popleft()
                if self._encoded:
                    self.position.row, tokens = self._encoded.popleft()
                    if self.ahead and self._hinted <= self.position.k and self.position.row > len(order) // 2:
                        # Not sooner: a lane that was just resumed reads what it needs first, and no more.
                        self._hinted = self.position.k + 1
                        self.corpus.ahead(self.source, self.lane, self._hinted)
                    return tokens, self.corpus.address(self.source, piece, int(order[self.position.row]))
                self.position.row = self._until
            self.position.k, self.position.row = self.position.k + 1, 0
            self._slice = None
            barren += 1
            if barren > len(self.corpus.order(self.source).slices) + 64:
                self.corpus.check_trainable(self.source)
                barren = 0

    def _open(self) -> tuple[int, Any, np.ndarray]:
        order = self.corpus.order(self.source)
        if self._slice is None:
            epoch, number = order.place(self.lane, self.position.k)
            self._slice = (
                number,
                self.corpus.read(self.source, order.slices[number]),
                order.rows(epoch, number),
            )
            self._encoded.clear()
            self._until = self.position.row
        return self._slice

    def _encode(self, piece: RowRange, rows: Rows, order: np.ndarray) -> None:
        """Tokenize the next rows from the position on, leaving out those held out or blank."""
        typical = piece.bytes // piece.rows or 4096
        count = min(max(ENCODE_BYTES // typical, 1), MAX_ENCODE_ROWS)
        first, last = self.position.row, min(self.position.row + count, len(order))
        share = self.corpus.config.holdout
        taken = rows.take([int(i) for i in order[first:last]])
        used = [
            (first + i, row)
            for i, row in enumerate(taken)
            if not is_blank(row.text) and not is_held_out(row.text, share)
        ]
        eos = self.encoder.eos_id
        ids = self.encoder.encode_batch([row.text for _, row in used]) if used else []
        for (at, row), tokens in zip(used, ids, strict=True):
            if ended := [*tokens, eos] if row.ends else tokens:
                self._encoded.append((at, np.asarray(ended, dtype=np.int32)))
        self._until = last


class Lane:
    """A lane of the mixture, from a cursor on; `ahead` lets it fetch slices before it comes to them."""

    def __init__(self, corpus: Corpus, encoder: Encoder, lane: int, cursor: LaneCursor, *, ahead: bool = False) -> None:
        config = corpus.config
        self.length = config.sequence_length + 1
        self.weights = corpus.weights
        self.cursor = cursor
        self.sources = [
            LaneSource(corpus, encoder, s, lane, position, ahead) for s, position in enumerate(cursor.positions)
        ]
        if ahead:
            for s, position in enumerate(cursor.positions):
                corpus.ahead(s, lane, position.k)
        self.phases = [
            permutation(config.lanes, 2, config.seed, s)[lane] / config.lanes for s in range(len(self.sources))
        ]

    def next(self) -> Window:
        """The lane's next window.

        Raises:
            SmolforgeError: a source is damaged, changed or away; the cursor points past its document.
        """
        parts, addresses = self.sources[self._most_behind()].take(self.length)
        ids = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        return Window(np.concatenate(parts), ids, addresses, self.cursor.to_json())

    def _most_behind(self) -> int:
        """The source whose next window is due first: window n of weight w and lane phase p is due at (n + p) / w."""
        due = [
            (at.drawn / self.length + phase) / weight
            for at, phase, weight in zip(self.cursor.positions, self.phases, self.weights, strict=True)
        ]
        return due.index(min(due))
