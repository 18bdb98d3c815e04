"""One lane: documents in the lane's order, joined by EOS, cut into windows of L+1 tokens.

A lane is a pure function of its cursor. In a mixture each window is filled from one source, the one furthest behind its
weight in tokens, so the shares of a lane stay within one window of the weights whatever the length of the documents; a
phase per lane keeps the lanes from drawing the same source at the same time. Documents are tokenized in the order in
which they are used, some 256 kB of text per `encode_batch`: whole row groups would be gigabytes of Python integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from smolforge.data.conversations import ChatEncoder, ChatSource
from smolforge.data.corpus import Address, Corpus, LeftOut
from smolforge.data.order import Position, RowRange, permutation, to_json
from smolforge.data.readers import BadRow, Rows
from smolforge.errors import CheckpointError
from smolforge.tokenizer import Tokenizer

ENCODE_BYTES = 256 << 10
MAX_ENCODE_ROWS = 512
MAX_TEXT = 1 << 20  # characters; a tokenizer needs some 240 times as many bytes of memory, so longer texts are cut


@dataclass
class Window:
    """L+1 tokens of a lane."""

    tokens: np.ndarray  # int32
    document_ids: np.ndarray  # the number of the document of each
    documents: list[Address]
    left_out: list[LeftOut]  # rows that the lane came past since its window before, in `data.on_error=skip`
    cursor: list[list[int]]  # the lane's after them
    learned: np.ndarray | None = None  # of chat data, bool (L+1,): which tokens are; None where all are


class LaneSource:
    """The stream of one source in one lane, from a position on."""

    learned: np.ndarray | None = None  # every token is

    def __init__(
        self, corpus: Corpus, encoder: Tokenizer, source: int, lane: int, position: Position, read_ahead: bool
    ) -> None:
        self.corpus, self.encoder, self.read_ahead = corpus, encoder, read_ahead
        self.source, self.lane, self.position = source, lane, position
        self._range: tuple[RowRange, Rows, np.ndarray] | None = None  # what is read, and the order of its rows
        self._encoded: deque[tuple[int, np.ndarray]] = deque()  # (row in order, tokens), ascending
        self._bad: deque[tuple[int, LeftOut]] = deque()  # (row in order, why), ascending, not yet passed
        self.left_out: list[LeftOut] = []  # passed, until the lane takes them
        self._until = 0  # rows before this one are tokenized or passed over
        self._requested = 0  # ranges before this one were requested ahead
        self._document: tuple[np.ndarray, Address] | None = None  # the one that the position is in

    def take(self, length: int) -> tuple[list[np.ndarray], list[Address]]:
        """The next `length` tokens, in parts of one document each, and the documents' addresses."""
        at, missing = self.position, length
        parts: list[np.ndarray] = []
        addresses: list[Address] = []
        while missing:
            if self._document is None:
                self._document = self._next()
            tokens, address = self._document
            if at.offset > len(tokens):
                problem = f"the data cursor is at token {at.offset} of a document of {len(tokens)}: {address}"
                hint = "The tokenizer is not the one that the run was made with."
                raise CheckpointError(problem, field="tokenizer", hint=hint)
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
        empty_ranges = 0
        while True:
            part, rows, order = self._open()
            while self.position.row < len(order):
                if self.position.row >= self._until:
                    self._encode(part, rows, order)
                while self._encoded and self._encoded[0][0] < self.position.row:
                    self._encoded.popleft()
                if self._encoded:
                    self.position.row, tokens = self._encoded.popleft()
                    self._pass_bad(self.position.row)
                    if self.read_ahead and self._requested <= self.position.k and self.position.row > len(order) // 2:
                        # Not earlier: a lane that was just resumed first reads what it needs, and no more.
                        self._requested = self.position.k + 1
                        self.corpus.read_ahead(self.source, self.lane, self._requested)
                    return tokens, self.corpus.address(self.source, part, int(order[self.position.row]))
                self.position.row = self._until
                self._pass_bad(self._until)
            self.position.k, self.position.row = self.position.k + 1, 0
            self._range = None
            empty_ranges += 1
            if empty_ranges > len(self.corpus.orders[self.source].ranges) + 64:
                self.corpus.check_trainable(self.source)
                empty_ranges = 0

    def _pass_bad(self, row: int) -> None:
        while self._bad and self._bad[0][0] < row:
            self.left_out.append(self._bad.popleft()[1])

    def _open(self) -> tuple[RowRange, Rows, np.ndarray]:
        if self._range is None:
            order = self.corpus.orders[self.source]
            epoch, number = order.place(self.lane, self.position.k)
            part = order.ranges[number]
            self._range = part, self.corpus.read(self.source, part), order.rows(epoch, number)
            self._encoded.clear()
            self._until = self.position.row
        return self._range

    def _encode(self, part: RowRange, rows: Rows, order: np.ndarray) -> None:
        """Tokenize the next rows from the position on, leaving out those held out or blank."""
        typical = part.bytes // part.rows or 4096
        count = min(max(ENCODE_BYTES // typical, 1), MAX_ENCODE_ROWS)
        first, last = self.position.row, min(self.position.row + count, len(order))
        taken = []
        for at in range(first, last):
            try:
                taken.append((at, rows(int(order[at]))))
            except BadRow:
                if at == first:
                    raise
                last = at  # the rows before it are used first
                break
        used = []
        for at, row in taken:
            if row.problem:
                address = self.corpus.address(self.source, part, int(order[at]))
                self._bad.append((at, LeftOut(address, row.problem)))
            elif not row.text.isspace() and (text := self.corpus.holdout.part(row.text, held_out=False)):
                used.append((at, row._replace(text=text)))
        short = [row.text for _, row in used if len(row.text) <= MAX_TEXT]
        ids = iter(self.encoder.encode_batch(short) if short else [])
        for at, row in used:
            if len(row.text) > MAX_TEXT:
                parts = [self.encoder.encode_batch([part])[0] for part in cut_text(row.text)]
                tokens = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
            else:
                tokens = np.asarray(next(ids), dtype=np.int32)
            if row.ends:
                tokens = np.append(tokens, np.int32(self.encoder.eos_id))
            if len(tokens):
                self._encoded.append((at, tokens))
        self._until = last


def cut_text(text: str) -> Iterator[str]:
    """Parts of at most ENCODE_BYTES characters, cut after a line or before a space where there is one."""
    at = 0
    while at < len(text):
        end = min(at + ENCODE_BYTES, len(text))
        if end < len(text):
            line, space = text.rfind("\n", at + 1, end), text.rfind(" ", at + 1, end)
            end = line + 1 if line > 0 else space if space > 0 else end
        yield text[at:end]
        at = end


class Lane:
    """A lane of the mixture from a cursor on; with `read_ahead` it fetches ranges before it needs them."""

    def __init__(
        self, corpus: Corpus, encoder: Tokenizer, lane: int, positions: list[Position], *, read_ahead: bool = False
    ) -> None:
        config = corpus.config
        self.length = config.sequence_length + 1
        self.weights = corpus.weights
        self.positions = positions
        numbered = list(enumerate(positions))
        self.sources: list[LaneSource] | list[ChatSource]
        if config.format != "text":
            chat = ChatEncoder(encoder, config)
            self.sources = [ChatSource(corpus, chat, s, lane, position) for s, position in numbered]
        else:
            self.sources = [LaneSource(corpus, encoder, s, lane, position, read_ahead) for s, position in numbered]
        if read_ahead:
            for s, position in enumerate(positions):
                corpus.read_ahead(s, lane, position.k)
        self.phases = [
            permutation(config.lanes, 2, config.seed, s)[lane] / config.lanes for s in range(len(self.sources))
        ]

    def next(self) -> Window:
        """The lane's next window."""
        source = self.sources[self._most_behind()]
        parts, addresses = source.take(self.length)
        left_out, source.left_out = source.left_out, []
        ids = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        return Window(np.concatenate(parts), ids, addresses, left_out, to_json(self.positions), source.learned)

    def _most_behind(self) -> int:
        """The source whose next window is due first: window n of weight w and lane phase p is due at (n + p) / w."""
        due = [
            (at.drawn / self.length + phase) / weight
            for at, phase, weight in zip(self.positions, self.phases, self.weights, strict=True)
        ]
        return due.index(min(due))
