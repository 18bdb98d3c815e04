"""The embedded corpus `tales`: original documents without end, whose entropy is known.

Document i is a pure function of (seed, i), in the genres and the schema of Cosmopedia v2. The generator knows the
probability of each choice it makes, so it knows the information in each text, and with it the lower bound in bits per
byte that no model can beat. This needs P(text) to be the probability of the text, not only of one way to derive it:
every choice is exact, lists hold no item twice, and the grammar is unambiguous (the tests parse sampled documents in
all ways: each has one derivation). A derivation ends where the text does, so the end is part of the probability.

    grammar.py   sentences with slots, read from the .txt files here, the choices in them, and the forms of words
    source.py    the corpus as a source of training data, and as files
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolforge.tales.grammar import Grammar

COLUMNS = ("prompt", "text", "token_length", "audience", "format", "seed_data")
"""Cosmopedia v2's columns, in its order."""
FILES = ("words.txt", "topics.txt", "stories.txt", "space.txt", "essays.txt", "posts.txt", "howto.txt", "lessons.txt")
_PIECES = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Genre:
    """How a genre appears in the schema."""

    rule: str  # the grammar's rule for a document
    share: int  # of the documents, relative to the other genres'
    audience: str
    format: str
    seed_data: str
    request: str  # the prompt, with the names of bound words in braces


GENRES = (
    Genre("story", 6, "young_children", "story_children", "tales_stories",
          "Write a story for young children about {hero}, who lives in a {home}. It should end with a lesson."),
    Genre("space", 5, "general", "story_space", "tales_stories",
          "Write a story about {lead} in the distant galaxy, with a journey, a danger and a discovery."),
    Genre("essay", 5, "college_students", "essay", "tales_topics",
          "Write an essay on the future of technology and what it means for {field}, its promises and its risks."),
    Genre("post", 2, "general", "blogpost", "tales_topics",
          "Write a blog post about {topic} in the first person, with a {pal}, a mistake and some advice."),
    Genre("howto", 1, "general", "wikihow", "tales_topics",
          "Write a how-to article for people who like {topic}, with what is needed and each step explained."),
    Genre("lesson", 1, "college_students", "textbook", "tales_topics",
          "Write a section of a textbook of {field} on {idea}, with examples and an exercise."),
)  # fmt: skip
_BOUNDS = tuple(itertools.accumulate(genre.share for genre in GENRES))
_GENRE_BITS = tuple(math.log2(_BOUNDS[-1] / genre.share) for genre in GENRES)


@dataclass(frozen=True, slots=True)
class TalesDocument:
    """One document, with the columns of Cosmopedia v2."""

    prompt: str  # the request that the text answers
    text: str  # paragraphs separated by an empty line
    audience: str
    format: str
    seed_data: str
    bits: float  # -log2 P(text), the information in it, its end included

    @property
    def token_length(self) -> int:
        """Words and punctuation marks in the text."""
        return len(_PIECES.findall(self.text))

    def row(self) -> dict[str, Any]:
        """The columns of Cosmopedia v2."""
        return {name: getattr(self, name) for name in COLUMNS}


@functools.cache
def language() -> Grammar:
    """The compiled grammar; read once per process."""
    from smolforge.tales.grammar import Grammar

    return Grammar((Path(__file__).parent / name).read_text(encoding="utf-8") for name in FILES)


def document(i: int, seed: int = 0) -> TalesDocument:
    """Document `i` (from 0) of the corpus `seed`; the same on every machine and in every order."""
    if i < 0:
        raise ValueError(f"i: {i} is not the index of a document")
    # Seeding with a text goes through SHA-512 and is fixed by Python's documentation.
    uniform = random.Random(f"tales/{seed}/{i}").random
    index = bisect.bisect_right(_BOUNDS, int(uniform() * _BOUNDS[-1]))
    genre = GENRES[index]
    draft = language().write(genre.rule, uniform)
    prompt = genre.request.format_map({variable: entry[""] for variable, entry in draft.bound.items()})
    bits = draft.bits + _GENRE_BITS[index]
    return TalesDocument(prompt, "".join(draft.out), genre.audience, genre.format, genre.seed_data, bits)


@functools.cache
def entropy_bits_per_byte(documents: int = 4096, seed: int = 0) -> float:
    """The lower bound: mean of -log2 P(text) over the mean length in UTF-8 bytes, estimated on `documents` documents.

    A model that pays for each text and for its end (the EOS token, which has no bytes) cannot go below it.
    """
    bits = size = 0.0
    for i in range(documents):
        made = document(i, seed)
        bits += made.bits
        size += len(made.text.encode())
    return bits / size
