"""Which documents training never sees.

A hash of the text alone decides: the choice is the same in any order, on any rank and for any seed, and identical texts
are on the same side, so a held-out document cannot leak into training through a duplicate. Where a few documents leave
one side empty, the extremes of the hash move: a document, or a part of the only one, goes to the other side.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from smolforge.errors import BadInput

logger = logging.getLogger(__name__)

RANGE = 2.0**64  # of the hash
# Documents; a side that should have so many is never empty (probability e**-64), so nothing is read to know.
PLENTY = 64


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class Holdout:
    """The side of each document."""

    share: float  # of all documents that are held out, by their hash
    added: frozenset[int] = frozenset()  # hashes that are held out besides
    spared: frozenset[int] = frozenset()  # that are trained on although the share takes them
    divided: frozenset[int] = frozenset()  # of documents of which only the end is held out

    def part(self, text: str, held_out: bool) -> str:
        """What of the text lies on that side: all, nothing (''), or a part."""
        if self.share <= 0:
            return "" if held_out else text
        number = _hash(text)
        if number in self.divided:
            cut = dividing_place(text)
            return text[cut:] if held_out else text[:cut]
        held = number in self.added or (number < self.share * RANGE and number not in self.spared)
        return text if held == held_out else ""


@dataclass
class _Source:
    """Of a source's documents, as far as they were looked at: number, extremes of the hash, and the first text."""

    name: str
    documents: int = 0
    low: int = 1 << 64
    high: int = -1
    first: str = ""

    def add(self, text: str) -> int:
        number = _hash(text)
        self.documents, self.first = self.documents + 1, self.first or text
        self.low, self.high = min(self.low, number), max(self.high, number)
        return number


def decide_holdout(sources: Sequence[tuple[str, int, Iterable[str]]], share: float, *, divide: bool = True) -> Holdout:
    """The holdout of these sources, each a name, the number of its rows, and its documents.

    Sources of many documents are left to the hash. Others are read until both sides have a document; what was decided
    is told. `divide`: a single document may be divided, as a text may and a conversation may not.
    """
    if share <= 0:
        return Holdout(0.0)
    limit, seen = share * RANGE, []
    found = share * sum(rows for _, rows, _ in sources) >= PLENTY
    for name, rows, texts in sources:
        if found and rows >= PLENTY:
            continue
        source = _Source(name)
        for text in texts:
            found |= source.add(text) < limit
            if found and source.high >= limit:
                break
        seen.append(source)
    filled = [source for source in seen if source.documents]
    added, spared, divided = set(), set(), set()
    for source in filled:
        if source.high >= limit:
            continue
        if source.low < source.high:
            spared.add(source.high)
            logger.info("%s: all %d documents fell to validation, so one is trained on", source.name, source.documents)
        elif divide and dividing_place(source.first):
            _divide(source, divided)
    if not found:
        single = [source for source in filled if source.low == source.high]
        alone = {source.low for source in single}
        several = [number for s in filled if s.low < s.high for number in (s.low, s.high) if number not in alone]
        if choice := min(several, default=None):
            added.add(choice)
            count = sum(source.documents for source in filled)
            logger.info("data.holdout=%g chose none of %d documents, so one is held out for validation", share, count)
        elif source := next((source for source in single if divide and dividing_place(source.first)), None):
            _divide(source, divided)
    return Holdout(share, frozenset(added), frozenset(spared), frozenset(divided))


def _divide(source: _Source, divided: set[int]) -> None:
    divided.add(source.low)
    logger.info("%s: the end of its only document is held out for validation", source.name)


def dividing_place(text: str) -> int:
    """Where to divide a document: about nine tenths from its start, after a line or a word; 0 where nothing is left."""
    most = len(text) * 9 // 10
    mark = next((mark for mark in ("\n", " ") if text.rfind(mark, len(text) // 2, most) >= 0), "")
    cut = text.rfind(mark, len(text) // 2, most) + 1 if mark else most
    return cut if text[:cut].strip() and text[cut:].strip() else 0


def none_chosen(what: str, verb: str) -> BadInput:
    """The error where nothing of a corpus is held out."""
    hint = f"Use --set data.holdout=0.1, or 0 to {verb} without validation."
    return BadInput(f"None of the {what} was chosen for validation", field="data.holdout", hint=hint)
