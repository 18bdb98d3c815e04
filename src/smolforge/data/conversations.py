"""One lane of chat data: whole conversations packed into windows, with the tokens that are learned.

A block of conversations in the lane's order is packed best-fit, the longest first, into windows of L+1 tokens; no
conversation is cut to fill one, and what is left of a window is padding. Each conversation and the padding has its
own document id, at whose borders attention stops. The windows of a block come in an order of their own, since the first
ones hold the longest conversations. A block depends on where it begins alone: a cursor is its first row, and the number
of its windows that were used.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from smolforge.chat_template import ChatTemplate
from smolforge.config import DataConfig
from smolforge.data.corpus import Address, Corpus, Document, LeftOut
from smolforge.data.order import Position, RowRange, permutation
from smolforge.data.readers import BadRow, Row
from smolforge.errors import BadInput, CheckpointError, DataError
from smolforge.formatting import clean, plural
from smolforge.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BLOCK = 16  # windows that the conversations of a block would fill without a gap


@dataclass
class Tokenized:
    """A conversation as tokens, int32 (n,), which of them are learned, bool (n,), and where it is.

    Of two answers to choose from, both conversations follow each other: the chosen one is the first `first` tokens.
    """

    ids: np.ndarray
    learned: np.ndarray
    address: Address
    too_long: bool
    first: int = 0

    @property
    def parts(self) -> list[np.ndarray]:
        """The tokens of each of its conversations."""
        return [self.ids[: self.first], self.ids[self.first :]] if self.first else [self.ids]


@dataclass
class ChatWindow:
    """A window of L+1 tokens in parts of one conversation each and padding; and which tokens are learned, (L+1,)."""

    parts: list[np.ndarray]
    addresses: list[Address]
    learned: np.ndarray


class ChatEncoder:
    """Makes tokens of conversations, as the configuration says what is learned and what is too long."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig) -> None:
        self.template, self.config, self.length = ChatTemplate(tokenizer), config, config.sequence_length + 1

    def encode(self, document: Document) -> Tokenized:
        """Tokens of a conversation; one that is too long is cut at the length of a window.

        Raises:
            BadRow: the template refuses it, or it cannot be learned exactly; file and row are named.
        """
        found = json.loads(document.text)
        chosen, rejected = found["messages"], found.get("rejected")
        same = 0  # messages that both begin with: they are not what is chosen between
        while rejected and chosen[same : same + 1] == rejected[same : same + 1] != []:
            same += 1
        try:
            sides = [
                self.template.encode_answers(side, tools=found.get("tools"), after=same)
                for side in (chosen, rejected)
                if side
            ]
        except BadInput as error:
            at = document.address
            where = f"{at.file}, row group {at.row_group}, row {at.row}"
            raise BadRow(f"{where}: {error.message}", field="data.sources", hint=error.hint) from None
        learned = [np.array(answers, dtype=bool) for _, answers in sides]
        for mask in learned:
            if self.config.loss_on == "all" and not rejected:
                mask[:] = True
            mask[0] = False  # nothing comes before it, from which it could be predicted
        tokens, mask = (np.concatenate(each) for each in ([ids for ids, _ in sides], learned))
        return Tokenized(
            tokens[: self.length].astype(np.int32), mask[: self.length], document.address, len(tokens) > self.length,
            first=len(learned[0]) if rejected else 0,
        )  # fmt: skip

    def usable(self, conversation: Tokenized) -> bool:
        """Whether a conversation is learned from; of a pair that is too long no part is."""
        skips = self.config.too_long == "skip" or conversation.first
        return bool(conversation.learned.any()) and not (conversation.too_long and skips)


class ChatSource:
    """The conversations of one source in one lane, from a position on; the counterpart of `packing.LaneSource`."""

    def __init__(self, corpus: Corpus, encoder: ChatEncoder, source: int, lane: int, position: Position) -> None:
        self.corpus, self.encoder, self.source, self.lane, self.position = corpus, encoder, source, lane, position
        self.left_out: list[LeftOut] = []  # passed, until the lane takes them
        self.learned: np.ndarray | None = None  # of the window that was taken last
        self._windows: list[ChatWindow] = []  # of the block at the position
        self._next = (0, 0)  # where the block after it begins

    def take(self, length: int) -> tuple[list[np.ndarray], list[Address]]:
        """The next window of `length` tokens, in parts of one conversation each and padding, and their addresses."""
        at = self.position
        if not self._windows:
            self._windows = self._block(length)
            if at.offset:  # a cursor inside of a block: what was left out in it was counted by its first window
                self.left_out = []
        if at.offset >= len(self._windows):
            problem = f"the data cursor is at window {at.offset} of a block of {len(self._windows)}"
            hint = "The tokenizer or its chat template is not the one that the run was made with."
            raise CheckpointError(problem, field="tokenizer", hint=hint)
        window = self._windows[at.offset]
        at.offset, at.drawn = at.offset + 1, at.drawn + length
        if at.offset == len(self._windows):
            at.k, at.row = self._next
            at.offset, self._windows = 0, []
        self.learned = window.learned
        return window.parts, window.addresses

    def _block(self, length: int) -> list[ChatWindow]:
        """The windows of the block that begins at the position."""
        k, row, tokens = self.position.k, self.position.row, 0
        found: list[Tokenized] = []
        ranges = self.corpus.orders[self.source]
        last = k + len(ranges.ranges) + 64
        while tokens < BLOCK * length:
            epoch, number = ranges.place(self.lane, k)
            part = ranges.ranges[number]
            rows, order = self.corpus.read(self.source, part), ranges.rows(epoch, number)
            while row < len(order) and tokens < BLOCK * length:
                conversation = self._read(part, rows(int(order[row])), int(order[row]))
                row += 1
                if conversation is not None:
                    found.append(conversation)
                    tokens += len(conversation.ids)
            if row == len(order):
                k, row = k + 1, 0
            if k >= last and not found:
                self.corpus.check_trainable(self.source)
                raise _nothing_fits(self.corpus, self.source)
        self._next = (k, row)
        windows = pack(found, length, self.encoder.template.tokenizer.eos_id)
        seed = self.corpus.config.seed
        shuffled = permutation(len(windows), 3, seed, self.source, self.lane, self.position.k, self.position.row)
        return [windows[i] for i in shuffled]

    def _read(self, part: RowRange, row: Row, number: int) -> Tokenized | None:
        """The conversation of a row, or None where it is held out or left out."""
        address = self.corpus.address(self.source, part, number)
        if row.problem:
            self.left_out.append(LeftOut(address, row.problem))
        if not row.text or not self.corpus.holdout.part(row.text, held_out=False):
            return None
        try:
            conversation = self.encoder.encode(Document(address, row.text))
        except BadRow as error:
            if self.corpus.config.on_error == "fail":
                raise
            self.left_out.append(LeftOut(address, error.message))
            return None
        return conversation if self.encoder.usable(conversation) else None


def _nothing_fits(corpus: Corpus, source: int) -> DataError:
    length = corpus.config.sequence_length
    problem = f"{corpus.specs[source]} has no conversation of at most {length + 1} tokens with an answer in it"
    return DataError(problem, field="data.sequence_length", hint="Make it longer, or set data.too_long=truncate.")


def pack(conversations: Sequence[Tokenized], length: int, padding: int) -> list[ChatWindow]:
    """The conversations in as few windows of `length` tokens as best-fit decreasing needs; `padding` fills the rest."""
    windows = []
    for members in best_fit([len(conversation.ids) for conversation in conversations], length):
        chosen = [conversations[i] for i in members]
        parts, learned = [part for each in chosen for part in each.parts], [each.learned for each in chosen]
        if missing := length - sum(map(len, parts)):
            parts.append(np.full(missing, padding, dtype=np.int32))
            learned.append(np.zeros(missing, dtype=bool))
        windows.append(ChatWindow(parts, [each.address for each in chosen], np.concatenate(learned)))
    return windows


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which of the lengths go together: the longest first, each where it leaves the least room."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, number of the bin), ascending
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[number], -1))
        left, chosen = free.pop(at) if at < len(free) else (room, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(number)
        insort(free, (left - lengths[number], chosen))
    return bins


@dataclass
class Survey:
    """What training will see in one epoch of chat data."""

    conversations: int = 0
    tokens: int = 0
    learned: int = 0
    too_long: int = 0
    windows: int = 0

    def report(self, config: DataConfig) -> str:
        """The survey for people."""
        length = config.sequence_length
        full = self.tokens / max(self.windows * (length + 1), 1)
        text = (
            f"data: {self.conversations:,} conversations in an epoch, {self.tokens:,} tokens of which {self.learned:,} "
            f"are learned, in {plural(self.windows, 'window')} of {length:,} ({full:.0%} full)"
        )
        what = "left out" if config.too_long == "skip" else "cut"
        long = f"{self.too_long:,} longer than {length + 1:,} tokens {what} (data.too_long={config.too_long})"
        return f"{text}; {long}" if self.too_long else text


def encoded(corpus: Corpus, encoder: ChatEncoder, *, held_out: bool) -> Iterator[Tokenized]:
    """All conversations in canonical order as tokens; one that cannot be used is an error, or left out."""
    for document in corpus.documents(held_out=held_out):
        try:
            yield encoder.encode(document)
        except BadRow:
            if corpus.config.on_error == "fail":
                raise


def survey(corpus: Corpus, tokenizer: Tokenizer) -> Survey:
    """Look at every training conversation once; DataError for the first that cannot be learned from."""
    encoder, found = ChatEncoder(tokenizer, corpus.config), Survey()
    lengths = []
    for conversation in encoded(corpus, encoder, held_out=False):
        found.too_long += conversation.too_long
        if encoder.usable(conversation):
            found.conversations += 1
            found.learned += int(conversation.learned.sum())
            lengths.append(len(conversation.ids))
    if not lengths:
        corpus.check_trainable(0)
        raise _nothing_fits(corpus, 0)
    found.tokens, found.windows = sum(lengths), len(best_fit(lengths, encoder.length))
    return found


def held_out_windows(corpus: Corpus, tokenizer: Tokenizer, max_tokens: int) -> Iterator[ChatWindow]:
    """Windows of the conversations that training never sees, up to about `max_tokens`."""
    encoder = ChatEncoder(tokenizer, corpus.config)
    found, tokens = [], 0
    for conversation in encoded(corpus, encoder, held_out=True):
        if encoder.usable(conversation):
            found.append(conversation)
            tokens += len(conversation.ids)
        if tokens >= max_tokens:
            break
    yield from pack(found, encoder.length, tokenizer.eos_id)


def show_learned(conversation: Tokenized, tokenizer: Tokenizer, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
    """The text of a conversation, special tokens included, with marks around what is learned, for people to read."""
    text, learning, part = "", False, []

    def flush() -> str:
        return clean(tokenizer.decode(part, skip_special_tokens=False))

    for token, learned in zip(conversation.ids.tolist(), conversation.learned.tolist(), strict=True):
        if learned != learning:
            text += flush() + marks[0 if learned else 1]
            learning, part = learned, []
        part.append(token)
    return text + flush() + (marks[1] if learning else "")
