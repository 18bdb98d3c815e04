"""The embedded corpus: a pure function, English with variety, and an entropy that is exact."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from smolforge import tales
from smolforge.tales import grammar
from smolforge.tales.grammar import ALT, DRAW, OWN, SUB, Grammar, GrammarError
from smolforge.tales.source import write
from tales.derivations import derivations, derivations_of_document

SMALL = """
@bird noun
owl crow goose:geese

@mood adjective
happy sad

@who name
he
Tom
she
Ann Eve

@tail
2* It {sang}.
It was {mood}.

@sang
sang [softly|loudly]
slept

@start
{hero=who} saw {b=bird.a} and {bird.a}. {hero.He} was {mood}. {tail}
3* {hero=who.kid}, {hero}: [one|two] {bird.s}, the {mood} {bird}.
"""


def language_of(grammar: Grammar, start: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for text, bits in derivations(grammar, start, None):
        found.setdefault(text, []).append(bits)
    return found


def test_document_is_a_pure_function_of_seed_and_index() -> None:
    later, first = tales.document(10**30, seed=7), tales.document(3)
    assert tales.document(3) == first
    assert tales.document(10**30, seed=7) == later
    assert tales.document(3, seed=1).text != first.text
    code = "from smolforge import tales; print(tales.document(3).text, end='')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == first.text
    with pytest.raises(ValueError, match="-1"):
        tales.document(-1)


def test_importing_is_light() -> None:
    code = (
        "import sys; from smolforge import tales; tales.document(0);"
        "print(sorted({'torch', 'numpy', 'pyarrow', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_no_two_of_100_000_documents_are_equal() -> None:
    hashes = {hash(tales.document(i).text) for i in range(100_000)}
    assert len(hashes) == 100_000


def test_texts_read_like_documents() -> None:
    words: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    openings: Counter[str] = Counter()
    for i in range(20_000):
        text = tales.document(i).text
        words.update(re.findall(r"[a-z]+(?:[-'][a-z]+)*", text.lower()))
        if i % 4:
            continue
        formats[tales.document(i).format] += 1
        openings.update(p for p in PROMPTS if text.startswith(p))
        assert 80 <= len(text.split()) <= 400
        assert "\n\n" in text and text == text.strip() and "\n\n\n" not in text
        assert text[0].isupper() and text[-1] in '.!?"'
        assert not FLAWS.search(text), (FLAWS.search(text), text)
    assert len(words) >= 2_500
    assert len(formats) == 6
    assert all(openings[prompt] >= 250 for prompt in PROMPTS), openings


# Marks of the grammar, bad spacing, a word twice in a row, a wrong article, a sentence that breaks off or starts small.
FLAWS = re.compile(
    r"[{}\[\]|_¶]|  | [.,]|[.,]{2}|\b([a-z]+) \1\b|\b[Aa] (?!one|uni|use)[aeiou]|\b[Aa]n [b-df-gj-np-tv-z]"
    r"|[a-z,]\n\n|[.!?] [a-z]"
)
PROMPTS = ("Once upon a time", "The future of artificial intelligence", "In the distant galaxy")


def test_documents_follow_cosmopedias_schema() -> None:
    document = tales.document(11)
    assert list(document.row()) == ["prompt", "text", "token_length", "audience", "format", "seed_data"]
    assert document.token_length == len(re.findall(r"\w+|[^\w\s]", document.text))
    assert "{" not in document.prompt


def test_each_text_has_one_derivation_with_the_bits_stated() -> None:
    # The proof that 2**-bits is the probability of the text: all derivations are tried. Since the entropy is the
    # mean of bits over documents drawn like these, a text with two derivations would have to be rarer than 1 / 500.
    for i in range(500):
        document = tales.document(i, seed=5)
        assert derivations_of_document(document.text) == [pytest.approx(document.bits)]


def test_foreign_texts_have_no_derivation() -> None:
    text = tales.document(0).text
    assert derivations_of_document(text[:-1]) == []
    assert derivations_of_document(text + " The end.") == []


def test_small_language_sums_to_one_and_is_unambiguous() -> None:
    found = language_of(Grammar([SMALL]), "start")
    assert all(len(bits) == 1 for bits in found.values())
    assert math.fsum(2 ** -bits[0] for bits in found.values()) == pytest.approx(1)
    # By hand: hero 1/3, two birds without return 1/3 * 1/2, mood 1/2, tail 1/3, the other mood 1; start 1/4.
    assert found["Tom saw an owl and a crow. He was sad. It was happy."] == [
        pytest.approx(math.log2(4 * 3 * 6 * 2 * 3))
    ]


def test_generator_draws_what_the_parser_scores() -> None:
    grammar = Grammar([SMALL])
    expected = {text: 2 ** -bits[0] for text, bits in language_of(grammar, "start").items()}
    rng, rounds = random.Random(0), 60_000
    drawn: Counter[str] = Counter()
    for _ in range(rounds):
        draft = grammar.write("start", rng.random)
        text = "".join(draft.out)
        drawn[text] += 1
        assert 2**-draft.bits == pytest.approx(expected[text])
    chi_square = sum((drawn[t] - rounds * p) ** 2 / (rounds * p) for t, p in expected.items())
    degrees = len(expected) - 1
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


def test_parser_finds_ambiguity() -> None:
    grammar = Grammar(["@a\nred[| and blue] sky\nred {b} sky\n\n@b\nand blue\nand green\n"])
    assert len(derivations(grammar, "a", "red and blue sky")) == 2


def test_first_use_again_after_a_list_is_used_up() -> None:
    grammar = Grammar(["@x noun\na b\n\n@start\n{x}{x}{x}\n"])
    assert set(language_of(grammar, "start")) == {"aba", "abb", "baa", "bab"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("@a noun\nowl owl\n", "twice"),
        ("@a\nyes\nyes\n", "twice"),
        ("@a\n[yes|yes]\n", "twice"),
        ("@a\nyes\n@a\nno\n", "defined twice"),
        ("@a\n[yes|no\n", "unbalanced"),
        ("@a\n{x=nothing}\n", "not a list"),
        ("@b noun\nowl\n@a\n{b.d}\n", "no form"),
        ("@b noun\nowl\n@a\n{b=b}\n", "name of a list"),
        ("@a\n", "empty"),
        ("@cow/calf noun\nx\n", "no list"),
    ],
)
def test_mistakes_in_a_grammar_are_told(text: str, complaint: str) -> None:
    with pytest.raises(GrammarError, match=complaint):
        Grammar([text])


def test_every_list_is_reached_and_every_slot_is_bound() -> None:
    grammar = tales.language()
    names = {id(part): name for name, part in {**grammar.words, **grammar.rules}.items()}
    used: set[str] = set()
    starts = {genre.rule for genre in tales.GENRES}

    def visit(parts: tuple) -> None:
        for part in parts:
            if isinstance(part, str):
                continue
            if part[0] == ALT:
                for choice in part[1]:
                    visit(choice)
            elif part[0] in (SUB, DRAW) and names[id(part[1])] not in used:
                used.add(names[id(part[1])])
                for alternative in getattr(part[1], "alternatives", ()):
                    visit(alternative)
            elif part[0] == OWN:
                used.update(name for name in grammar.words if name.endswith(part[1][1]))

    for start in starts:
        for alternative in grammar.rules[start].alternatives:
            visit(alternative)
    assert used | starts == set(grammar.words) | set(grammar.rules)


def test_entropy_is_the_mean_over_the_corpus() -> None:
    total = [tales.document(i) for i in range(1000)]
    floor = sum(document.bits for document in total) / sum(len(document.text.encode()) for document in total)
    assert tales.entropy_bits_per_byte(1000) == pytest.approx(floor)
    assert tales.entropy_bits_per_byte() == pytest.approx(tales.entropy_bits_per_byte(seed=9), rel=0.01)
    assert 0.2 < floor < 0.5


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt"])
def test_shards_hold_the_documents(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "new" / f"shard.{kind}", kind, documents=range(5, 30), row_group_size=10)  # type: ignore[arg-type]
    texts = [tales.document(i).text for i in range(5, 30)]
    if kind == "txt":
        assert path.read_text(encoding="utf-8").split("<|endoftext|>") == [*texts, ""]
        return
    if kind == "parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        assert file.num_row_groups == 3
        rows = file.read().to_pylist()
    else:
        raw = path.read_bytes()
        if kind == "jsonl.gz":
            raw = gzip.decompress(raw)
        elif kind == "jsonl.zst":
            import zstandard

            raw = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
        rows = [json.loads(line) for line in raw.decode().splitlines()]
    assert rows == [tales.document(i).row() for i in range(5, 30)]


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="csv"):
        write(tmp_path / "x", "csv", range(2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "article"),
    [("otter", "an otter"), ("unicorn", "a unicorn"), ("hour", "an hour"), ("one-eyed", "a one-eyed"),
     ("useful", "a useful"), ("unusual", "an unusual"), ("uneven", "an uneven"), ("fox", "a fox")],
)  # fmt: skip
def test_articles(word: str, article: str) -> None:
    assert grammar.with_article(word) == article


def test_inflection() -> None:
    assert [grammar.plural(w) for w in ("fox", "berry", "day", "cup of tea")] == [
        "foxes",
        "berries",
        "days",
        "cups of tea",
    ]
    assert [grammar.past(w) for w in ("carry", "smile", "look after")] == ["carried", "smiled", "looked after"]
    assert [grammar.gerund(w) for w in ("smile", "see", "look after")] == ["smiling", "seeing", "looking after"]
    verb = grammar.entries("verb", ["run:ran:running fold_up"])
    assert verb[0] == {
        "": "run",
        "C": "Run",
        "s": "runs",
        "S": "Runs",
        "d": "ran",
        "D": "Ran",
        "ing": "running",
        "Ing": "Running",
    }
    assert verb[1]["d"] == "folded up" and verb[1]["s"] == "folds up"
