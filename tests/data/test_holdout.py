"""Both sides have text: of few documents at least one is held out, of the only one a part, and the rest is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.conftest import Logged, batches, digests, is_held_out, jsonl, named, resumed
from smolforge.data import Corpus
from smolforge.data.holdout import dividing_place
from smolforge.data.readers.text import PIECE

FEW = [text for text in named(80) if not is_held_out(text, 0.01)][:60]
BOOK = "".join(f"Line {i} of a book that goes on and on.\n" for i in range(9000))


def sides(corpus: Any) -> tuple[list[str], list[str]]:
    """What is trained on, and what is held out."""
    return [d.text for d in corpus.documents(held_out=False)], [d.text for d in corpus.documents(held_out=True)]


def fed(corpus: Any, steps: int) -> str:
    """The text that the first steps were fed."""
    made = batches(corpus, steps)
    return "".join(bytes(t - 1 if t else 10 for t in row.tolist()).decode() for b in made for row in b.tokens)


def test_of_few_documents_one_is_held_out(opened: Any, tmp_path: Path, logged: Logged) -> None:
    corpus = opened(jsonl(tmp_path / "a.jsonl", FEW))
    trained, held = sides(corpus)
    assert len(held) == 1 and sorted(trained + held) == sorted(FEW)
    assert logged()[-1] == "data.holdout=0.01 chose none of 60 documents, so one is held out for validation"
    assert held[0] not in fed(corpus, 60) and all(text in fed(corpus, 60) for text in trained[:5])
    backwards = opened(jsonl(tmp_path / "b.jsonl", [*FEW[::-1], held[0]]))
    assert sides(backwards)[1] == [held[0]] * 2, "whatever the order, and with its duplicates"


def test_of_the_only_document_the_end_is_held_out(opened: Any, tmp_path: Path, logged: Logged) -> None:
    text = "\n".join(f"Sentence {i} of the only document." for i in range(40))
    for share in (0.01, 0.49999):
        corpus = opened(jsonl(tmp_path / "a.jsonl", [text]), holdout=share, lanes=2)
        (trained,), (held,) = sides(corpus)
        assert trained + held == text and 0 < len(held) < len(text) / 5 and held.startswith("Sentence")
        assert "the end of its only document is held out" in logged()[-1]
        assert held.strip() not in fed(corpus, 30)


def test_of_one_book_a_piece_is_held_out(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    trained, held = sides(opened(tmp_path / "book.txt", holdout=1e-9))
    assert len(held) == 1 and len(held[0]) <= PIECE and len(trained) == len(BOOK) // PIECE


def test_a_source_that_fell_to_validation_is_trained_on(opened: Any, tmp_path: Path, logged: Logged) -> None:
    texts = [t for t in named(100) if is_held_out(t, 0.4)][:4]
    corpus = opened(jsonl(tmp_path / "a.jsonl", FEW), jsonl(tmp_path / "b.jsonl", texts), holdout=0.4)
    trained = [d.text for d in corpus.documents_of(1, held_out=False)]
    assert len(trained) == 1 and "b.jsonl: all 4 documents fell to validation" in " ".join(logged())
    assert {a.source for b in batches(corpus, 4) for a in b.documents} == set(corpus.specs)


def test_no_source_loses_its_only_document(opened: Any, tmp_path: Path) -> None:
    (low,) = sides(opened(jsonl(tmp_path / "a.jsonl", FEW)))[1]
    corpus = opened(jsonl(tmp_path / "a.jsonl", FEW), jsonl(tmp_path / "b.jsonl", [low]))
    assert [d.text for d in corpus.documents_of(1, held_out=False)] == [low] and len(sides(corpus)[1]) == 1
    each = opened(
        jsonl(tmp_path / "c.jsonl", ["one two three " * 20]), jsonl(tmp_path / "d.jsonl", ["four five " * 20])
    )
    (first, second), held = sides(each)
    assert len(held) == 1 and first + held[0] == "one two three " * 20 and second == "four five " * 20


def test_many_documents_are_left_to_the_hash(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = named(7000)
    corpus = opened(jsonl(tmp_path / "a.jsonl", texts))
    with monkeypatch.context() as patched:
        patched.setattr(Corpus, "read", None)
        assert corpus.holdout.share == 0.01, "nothing was read to decide"
    trained, held = sides(corpus)
    assert held == [t for t in texts if is_held_out(t, 0.01)] and len(trained) + len(held) == 7000
    assert sides(opened(tmp_path / "a.jsonl", holdout=0)) == (texts, [])


def test_the_stream_of_few_documents_is_resumed_exactly(opened: Any, tmp_path: Path) -> None:
    made = batches(opened(jsonl(tmp_path / "a.jsonl", ["only one, " * 30])), 20)
    again = opened(tmp_path / "a.jsonl")
    for workers in (0, 2):
        rest = batches(again, 10, cursor=resumed([made[9].cursor]), workers=workers)
        assert digests(rest) == digests(made[10:])


@pytest.mark.parametrize("text", ["", "a", " b ", "ab", "a b", "a\nb\nc", "word " * 100, "x" * 1000])
def test_dividing_leaves_text_on_both_sides(text: str) -> None:
    place = dividing_place(text)
    assert 0 <= place < max(len(text), 1)
    assert not place or (text[:place].strip() and text[place:].strip())


def test_a_long_text_ends_once_where_it_is_read_as_a_whole(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(BOOK + "<|endoftext|>short<|endoftext|>" + BOOK[:100])
    parts = list(opened(tmp_path / "book.txt").parts())
    assert "".join(text for text, _ in parts[:-2]) == BOOK.rstrip("\n")
    assert [ends for _, ends in parts] == [False] * (len(parts) - 3) + [True] * 3
    two = opened(tmp_path / "book.txt", jsonl(tmp_path / "a.jsonl", FEW))
    mixed = list(two.parts())
    first = next(i for i, (text, _) in enumerate(mixed) if text == BOOK[: len(text)])
    assert not any(text in FEW for text, _ in mixed[first : first + len(parts) - 2]), "not interrupted"
