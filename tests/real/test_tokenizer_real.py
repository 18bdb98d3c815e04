"""The genuine SmolLM2 tokenizer, against transformers and against its published bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from smolforge.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

TORTURE = [
    "", "Once upon a time", "0123456789 3.14159 1,000,000", "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301",
    "日本語テキスト العربية עברית हिन्दी ไทย",
    "<|endoftext|> is text", "<|im_start|>user\nhi<|im_end|>", " " * 300 + "x" + "\n" * 50,
    "a\x00b\x7f\u200b\ufeff\U0010ffff",
    "def f(x):\n\treturn x**2  # don't", "ſtraße ǅ ﬁ Ⅻ ½",
]  # fmt: skip


@pytest.fixture(scope="module")
def genuine(real_data: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(real_data / "tokenizer" / "smollm2-135m")


@pytest.fixture(scope="module")
def oracle(real_data: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(real_data / "tokenizer" / "smollm2-135m")


def test_it_is_the_published_one(real_data: Path, genuine: Tokenizer) -> None:
    digest = hashlib.sha256((real_data / "tokenizer" / "smollm2-135m" / "tokenizer.json").read_bytes()).hexdigest()
    assert digest.startswith("9ca9acddb652") and digest.endswith("e47c")
    assert genuine.vocab_size == 49_152
    assert genuine.eos_id == 0
    assert [genuine.token_text(i) for i in range(17)] == list(SPECIAL_TOKENS)
    assert genuine.special_ids == frozenset(range(17))


def texts(real_data: Path) -> list[str]:
    folder = real_data / "text"
    stories = (folder / "tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")[1:60]
    wiki = (folder / "wikitext2_valid.txt").read_text(encoding="utf-8")[:60_000]
    with (folder / "classic_books.jsonl").open(encoding="utf-8") as file:
        book = json.loads(file.readline())["text"][:100_000]
    record = (folder / "cosmopedia_v2_record.jsonl").read_text(encoding="utf-8")
    return [*TORTURE, *stories, wiki, book, record]


def test_ids_and_text_equal_those_of_transformers(real_data: Path, genuine: Tokenizer, oracle: Any) -> None:
    samples = texts(real_data)
    theirs = oracle(samples, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert genuine.encode_batch(samples) == theirs
    for text, ids in zip(samples, theirs, strict=True):
        assert genuine.encode(text) == ids
        assert genuine.decode(ids) == oracle.decode(ids) == text
        decoder = StreamDecoder(genuine)
        assert "".join([*map(decoder.push, ids), decoder.flush()]) == text


def test_commands_equal_those_of_transformers(genuine: Tokenizer, oracle: Any) -> None:
    for text in TORTURE:
        assert genuine.encode_with_special_tokens(text) == oracle(text, add_special_tokens=False)["input_ids"]


def test_the_instruct_model_brings_its_template(real_data: Path) -> None:
    instruct = Tokenizer.from_pretrained(real_data / "tokenizer" / "smollm2-135m-instruct")
    assert instruct.chat_template and "<|im_start|>" in instruct.chat_template
    assert instruct.token_text(instruct.eos_id) == "<|im_end|>"


def test_saved_and_read_by_transformers(genuine: Tokenizer, oracle: Any, tmp_path: Path, real_data: Path) -> None:
    from transformers import AutoTokenizer

    genuine.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(real_data):
        assert theirs(text)["input_ids"] == oracle(text)["input_ids"]
    assert theirs.eos_token == oracle.eos_token and len(theirs) == len(oracle)
    assert Tokenizer.from_pretrained(tmp_path).encode("Once upon a time") == genuine.encode("Once upon a time")
