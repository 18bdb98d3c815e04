"""Text to tokens and back: nothing is lost, streams show whole characters, transformers reads the files alike."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.errors import BadInput, CheckpointError, SmolforgeError
from smolforge.tokenizer import END_OF_TEXT, LONGEST_WORD, SPECIAL_TOKENS, StreamDecoder, Tokenizer, _with_blanks

CORPUS = [
    "Once upon a time there was a small café by the sea. It had 1234 guests, and 5 cats!\n\n",
    "The naïve robot said: “héllo wörld” — and 🙂🙃 smiled. 东京は大きい。\tTabs  and   spaces.\r\n",
    "def f(x):\n    return x ** 2  # comment\n",
] * 20  # fmt: skip
TORTURE = [
    "", " ", "\n", "   \t\n  \u3000", "0123456789 3.14159 1,000,000", "🙂👩‍👩‍👧‍👦🏳️‍🌈e\u0301",
    "日本語テキスト العربية עברית हिन्दी ไทย",
    "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>", "a\x00b\x7f\u200b\ufeff", "don't I'll we've ' 's", "ſtraße ǅ ﬁ",
    "x" * 3000, " " * 500, "\U0010ffff\ufffd",
]  # fmt: skip
TEXT = st.text(max_size=60) | st.text(st.sampled_from("ab 1é🙂\n<|endoftext>東\u0301"), max_size=60)


def test_a_text_without_blanks_is_trained_on_in_short_words() -> None:
    letters = "".join(random.Random(0).choices("ACGT", k=400_000))  # as one word it takes a minute
    seen = _with_blanks(f"a {letters} b")
    assert max(map(len, seen.split())) == LONGEST_WORD and seen.replace(" ", "") == f"a{letters}b"
    assert _with_blanks(CORPUS[1]) is CORPUS[1]
    made = Tokenizer.train([letters], 600)
    assert made.decode(made.encode(letters)) == letters and len(made.encode(letters)) < 150_000


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(CORPUS, 400)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


def test_a_trained_tokenizer_has_the_shape_of_smollm2s(trained: Tokenizer) -> None:
    assert trained.vocab_size == 400
    assert trained.eos_id == 0 and trained.token_text(0) == END_OF_TEXT
    assert [trained.token_text(i) for i in range(17)] == list(SPECIAL_TOKENS)
    assert trained.special_ids == frozenset(range(17))
    digits = trained.encode("2024")
    assert [trained.token_bytes(i) for i in digits] == [b"2", b"0", b"2", b"4"]
    assert trained.chat_template is None


def test_training_is_the_same_in_another_process(trained: Tokenizer, tmp_path: Path) -> None:
    """A resumed or repeated run must end up with the same vocabulary, whatever the seeds of hash tables."""
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))
    code = (
        "import json, sys; from smolforge.tokenizer import Tokenizer as t;"
        "sys.stdout.write(t.train(json.load(open(sys.argv[1])), 400).backend.to_str())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "corpus.json")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == trained.backend.to_str()


@pytest.mark.parametrize("size", [0, 272])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size: int) -> None:
    with pytest.raises(BadInput, match="at least 273"):
        Tokenizer.train(["a"], size)


def test_training_on_nothing_still_spells_everything() -> None:
    bare = Tokenizer.train([], 273)
    assert bare.vocab_size == 273
    assert bare.decode(bare.encode("é 🙂 12")) == "é 🙂 12"


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_nothing_is_lost(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert b"".join(trained.token_bytes(i) for i in ids) == text.encode()
    assert "".join(stream(trained, ids)) == text
    assert not trained.special_ids & set(ids), "text is never a command"
    assert trained.encode_batch([text, "", text]) == [ids, [], ids]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(-1, 430), max_size=40))
def test_a_stream_of_any_tokens_joins_to_their_text(trained: Tokenizer, ids: list[int]) -> None:
    """Also where the tokens form no characters, and for ids that nobody has."""
    whole = trained.decode([i for i in ids if i >= 0])
    pieces = stream(trained, ids)
    assert "".join(pieces) == whole


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_no_piece_ever_shows_half_a_character(trained: Tokenizer, text: str) -> None:
    decoder, shown = StreamDecoder(trained), ""
    for i in trained.encode(text):
        shown += decoder.push(i)
        assert text.startswith(shown)
    assert shown + decoder.flush() == text


def test_special_tokens_are_commands_only_where_asked(trained: Tokenizer) -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    assert trained.encode_with_special_tokens(text)[0] == 1
    assert trained.encode_with_special_tokens(text)[-1] == 2
    assert not {1, 2} & set(trained.encode(text))
    assert trained.decode([1, *trained.encode("hi"), 2]) == "hi"
    assert trained.decode([1, *trained.encode("hi"), 2], skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


def test_commands_and_saving_do_not_change_what_other_threads_encode(trained: Tokenizer, tmp_path: Path) -> None:
    """A page may encode a chat, and a checkpoint be saved, while the loader's threads encode documents."""
    text = "a <|endoftext|> b " * 200
    right, wrong, stop = trained.encode(text), [], threading.Event()

    def reader() -> None:
        while not stop.is_set():
            if trained.encode(text) != right:
                wrong.append(1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places between almost any two instructions
    try:
        threads = [threading.Thread(target=reader) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            trained.encode_with_special_tokens(text)
        for _ in range(10):
            trained.save(tmp_path)
        stop.set()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        sys.setswitchinterval(interval)
    assert not wrong


def test_lone_surrogates_become_the_replacement_character(trained: Tokenizer) -> None:
    assert trained.decode(trained.encode("a\ud83db")) == "a\ufffdb"
    assert trained.encode_batch(["\udc00"]) == [trained.encode("\ufffd")]
    assert trained.encode("\ud83d\ude42") == trained.encode("🙂")


@pytest.mark.parametrize("text", TORTURE, ids=range(len(TORTURE)))
def test_transformers_reads_the_files_alike(trained: Tokenizer, tmp_path: Path, text: str) -> None:
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode(text) == trained.encode(text)
    assert theirs(text, split_special_tokens=True)["input_ids"] == trained.encode(text)
    assert theirs(text)["input_ids"] == trained.encode_with_special_tokens(text)
    assert theirs.decode(trained.encode(text)) == trained.decode(trained.encode(text)) == text


def test_saved_files(trained: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained.save(tmp_path / "a")
    Tokenizer.from_pretrained(tmp_path / "a").save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (
        json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (0, 0, 400)
    # What transformers writes is read back too.
    theirs.save_pretrained(tmp_path / "c")
    assert Tokenizer.from_pretrained(tmp_path / "c").encode("two cats") == trained.encode("two cats")


def test_chat_templates_wherever_they_are_kept(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_pretrained(tmp_path).chat_template == "from the file"
    (tmp_path / "chat_template.jinja").unlink()
    for value, expected in (
        ("inline", "inline"),
        ([{"name": "default", "template": "named"}], "named"),
        ([3], None),
        (5, None),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
        assert Tokenizer.from_pretrained(tmp_path).chat_template == expected


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"eos_token": "not there"}'),
        ("tokenizer_config.json", '{"eos_token": {"wrong": 1}}'),
        ("tokenizer_config.json", '{"eos_token": ["x"]}'),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}'),
    ],
)
def test_damaged_files_are_one_clear_error(trained: Tokenizer, tmp_path: Path, name: str, content: str) -> None:
    trained.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(SmolforgeError):
        Tokenizer.from_pretrained(tmp_path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_fuzzed_files_give_clear_errors_or_a_tokenizer_that_works(
    trained: Tokenizer, tmp_path_factory: Any, data: Any
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    trained.save(directory)
    path = directory / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 30))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"9", b"-1", b"{}"])
        )
    path.write_bytes(raw)
    try:
        found = Tokenizer.from_pretrained(directory)
    except SmolforgeError:
        return
    found.decode(found.encode("a cat 12 é"))
    assert all(isinstance(found.token_bytes(i), bytes) for i in range(min(found.vocab_size, 500)))


def test_the_token_that_begins_a_text(trained: Tokenizer) -> None:
    assert trained.bos_id == trained.eos_id == 0
    assert Tokenizer(trained.backend, {"bos_token": "<|im_start|>"}).bos_id == 1
    assert Tokenizer(trained.backend, {"bos_token": {"content": "<|im_end|>"}}).bos_id == 2
    assert Tokenizer(trained.backend, {"bos_token": "<s>"}).bos_id == 0, "not in the vocabulary"


def test_special_tokens_named_only_in_their_map(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    names = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_id, loaded.bos_id) == (2, 1)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert Tokenizer.from_pretrained(tmp_path).eos_id == 0, "tokenizer_config.json wins"


def test_a_huge_text_is_trained_on_in_pieces(monkeypatch) -> None:
    import tokenizers

    class Seen(Exception):
        pass

    def watch(pieces, trainer) -> None:
        raise Seen(list(pieces))

    monkeypatch.setattr(tokenizers, "Tokenizer", lambda model: SimpleNamespace(train_from_iterator=watch))
    text = "a line of a huge record\n" * 100_000
    with pytest.raises(Seen) as caught:
        Tokenizer.train([text, "short", ""], 300)
    [seen] = caught.value.args
    assert max(map(len, seen)) <= 1 << 20 and "".join(seen) == text + "short"
