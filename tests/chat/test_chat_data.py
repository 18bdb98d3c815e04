"""Chat data: every form and format is the same conversations; whole ones are packed, masked and found again."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_files import Messages, conversations, rows_of, write
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge import tales
from smolforge.chat_template import CHATML, ChatTemplate
from smolforge.config import DataConfig
from smolforge.data import Batch, Corpus, Loader, batch_of_step, merge_cursors
from smolforge.data.conversations import best_fit, survey
from smolforge.data.readers.conversation import conversation_text
from smolforge.errors import CheckpointError, DataError
from smolforge.tokenizer import Tokenizer

LENGTH = 96
MADE = conversations(90)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    trained = Tokenizer.train([tales.document(i).text for i in range(60)], 500)
    return Tokenizer(trained.backend, {"eos_token": "<|im_end|>", "chat_template": CHATML})


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """Open a file as chat data."""
    found: list[Corpus] = []

    def open_corpus(*paths: Path, index: Any = None, **settings: Any) -> Corpus:
        config = DataConfig(
            sources={str(path): 1.0 for path in paths}, format="chat",
            **{"sequence_length": LENGTH, "lanes": 4, "holdout": 0.1, "mask_documents": True, "workers": 0, **settings},
        )  # fmt: skip
        found.append(Corpus.open(config, index=index, cache_dir=tmp_path / "cache"))
        return found[-1]

    yield open_corpus
    for corpus in found:
        corpus.close()


QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}
FORMS: dict[str, tuple[dict[str, Any], Messages]] = {
    "messages": ({"messages": [SYSTEM, QUESTION, ANSWER], "id": 3}, [SYSTEM, QUESTION, ANSWER]),
    "parts": ({"messages": [QUESTION, {**ANSWER, "content": [{"type": "text", "text": "So."}]}]}, [QUESTION, ANSWER]),
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"},
                           {"from": "gpt", "value": "So."}]},
        [SYSTEM, QUESTION, ANSWER],
    ),
    "sharegpt with roles": ({"conversations": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
    "prompt and completion": ({"prompt": "Why?", "completion": "So."}, [QUESTION, ANSWER]),
    "both as messages": ({"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    "alpaca without input": ({"instruction": "Why?", "input": "", "output": "So."}, [QUESTION, ANSWER]),
    "alpaca with a system": (
        {"system": "Be brief.", "instruction": "Why?", "output": "So."}, [SYSTEM, QUESTION, ANSWER],
    ),
    "question and answer": ({"id": "a1", "q": "Why?", "a": "So.", "sources": ["x"]}, [QUESTION, ANSWER]),
    "preferences": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, [QUESTION, ANSWER]),
    "whole preferences": ({"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
    "with the prompt twice": (
        {"prompt": "Why?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, [QUESTION, ANSWER],
    ),
    "json in a column": ({"messages": json.dumps([QUESTION, ANSWER])}, [QUESTION, ANSWER]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_found_by_its_columns(name: str) -> None:
    row, expected = FORMS[name]
    assert json.loads(conversation_text(row)) == {"messages": expected}


def test_tools_stay_with_their_conversation() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "3", "tool_call_id": "x"}
    row = {"messages": [QUESTION, call, result, ANSWER], "tools": json.dumps([{"name": "f"}])}
    found = json.loads(conversation_text(row))
    assert found["tools"] == [{"name": "f"}]
    assert found["messages"] == [QUESTION, {**call, "content": ""}, result, ANSWER]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"text": "Once"}, "is not a conversation: it has 'text'"),
    "two forms": ({"messages": [QUESTION, ANSWER], "instruction": "a", "output": "b"},
                  r"could be read as messages and instruction\+output"),
    "no answer": ({"messages": [QUESTION]}, "no message of the assistant"),
    "empty answer": ({"prompt": "Why?", "completion": " "}, "completion is empty"),
    "a role": ({"messages": [{"role": "narrator", "content": "x"}, ANSWER]}, "message 1 has the role 'narrator'"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
                 "message 1 has a part of type image_url"),
    "no text": ({"messages": [QUESTION, {"role": "assistant"}]}, "message 2 has no text: its content is missing"),
    "a number": ({"prompt": 3, "completion": "x"}, "prompt has no text: its content is int"),
    "no list": ({"messages": "hello"}, "messages must be a list of messages, not str"),
    "a list as role": ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "message 1 has the role"),
    "no tools": ({"messages": [QUESTION, ANSWER], "tools": "none"}, "tools is not valid JSON"),
    "no message": ({"messages": ["hello"]}, "message 1 must have role and content, and is str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_one_error_with_its_place_or_left_out(name: str, opened: Any, tmp_path: Path) -> None:
    row, problem = BROKEN[name]
    path = write(tmp_path / "a.jsonl", [*rows_of(MADE[:20]), row])
    with pytest.raises(DataError, match=f"a.jsonl, line 21 .*{problem}"):
        opened(path)
    assert sum(1 for _ in opened(path, on_error="skip").documents()) == 20


def test_text_beside_conversations_is_left_out(opened: Any, tmp_path: Path) -> None:
    folder = tmp_path / "faq"
    folder.mkdir()
    (folder / "README.txt").write_text("Questions and answers.")
    with pytest.raises(DataError, match="holds no conversations"):
        opened(folder)
    with pytest.raises(DataError, match=r"README\.txt holds text, not conversations"):
        opened(folder / "README.txt")
    write(folder / "a.csv", rows_of(MADE[:3]))
    assert sum(1 for _ in opened(folder).documents()) == 3
    index = opened(folder).index
    (folder / "LICENSE.txt").write_text("MIT")
    assert sum(1 for _ in opened(folder, index=index).documents()) == 3


def batches(corpus: Corpus, tokenizer: Tokenizer, count: int, **more: Any) -> list[Batch]:
    with Loader(corpus, tokenizer, sequences_per_step=4, workers=0, **more) as loader:
        return [next(loader) for _ in range(count)]


def same(one: Batch, other: Batch) -> bool:
    arrays = ("tokens", "document_ids", "learned")
    return one.digests == other.digests and all(np.array_equal(getattr(one, a), getattr(other, a)) for a in arrays)


def test_all_formats_give_the_same_batches(opened: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    # As large as each other: what a lane reads at a time depends on the rows and bytes of a file.
    files = [write(tmp_path / f"a{ending}", rows_of(MADE)) for ending in (".jsonl", ".json", ".parquet", ".csv")]
    corpora = [opened(file) for file in files]
    texts = [[document.text for document in corpus.documents()] for corpus in corpora]
    assert all(each == texts[0] for each in texts) and len(texts[0]) == 90
    found = [batches(corpus, tokenizer, 6) for corpus in corpora]
    for others in found[1:]:
        assert all(same(a, b) for a, b in zip(found[0], others, strict=True))


def test_text_is_read_from_csv_and_json_too(tmp_path: Path) -> None:
    for name in ("a.csv", "a.json"):
        path = write(tmp_path / name, [{"id": str(i), "text": f"text {i},\nof two lines"} for i in range(5)])
        with Corpus.open(DataConfig(sources={str(path): 1.0}), cache_dir=tmp_path / "cache") as corpus:
            assert [d.text for d in corpus.documents()] == [f"text {i},\nof two lines" for i in range(5)]


def test_chat_data_in_pretraining_names_the_right_verb(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        path = write(tmp_path / name, rows_of(MADE[:3]))
        with pytest.raises(DataError, match="smolforge finetune"):
            Corpus.open(DataConfig(sources={str(path): 1.0}), cache_dir=tmp_path / "cache")


def pieces(batch: Batch) -> list[tuple[list[int], list[bool]]]:
    """The conversations of a batch, without padding."""
    assert batch.learned is not None
    found = []
    for tokens, ids, learned in zip(batch.tokens, batch.document_ids, batch.learned, strict=True):
        for number in range(int(ids.max()) + 1):
            part = ids == number
            if learned[part].any():
                found.append((tokens[part].tolist(), learned[part].tolist()))
            else:
                assert number == ids.max() and set(tokens[part].tolist()) == {tokens[part][0]}  # padding, at the end
    return found


def encode(tokenizer: Tokenizer, messages: Messages) -> tuple[list[int], list[bool]]:
    ids, answers = ChatTemplate(tokenizer).encode_answers(messages)
    return ids, answers


def test_whole_conversations_are_packed_and_named(opened: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = opened(write(tmp_path / "a.jsonl", rows_of(MADE)))
    texts = {d.text: d.address for d in corpus.documents(held_out=False)}
    expected = [encode(tokenizer, json.loads(text)["messages"]) for text in texts]
    fitting = [each for each in expected if len(each[0]) <= LENGTH + 1]
    assert 0 < len(fitting) < len(expected) < 90
    seen: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for batch in batches(corpus, tokenizer, 40):
        for ids, learned in pieces(batch):
            assert (ids, learned) in fitting
            seen[str(ids)] += 1
        named.update(str(address) for address in batch.documents)
    # Passes through the data: each conversation about as often as the others.
    assert len(seen) == len(fitting) == len(named)
    assert max(seen.values()) - min(seen.values()) <= 2
    long = opened(tmp_path / "a.jsonl", sequence_length=400)
    filled = sum(sum(len(ids) for ids, _ in pieces(batch)) for batch in batches(long, tokenizer, 20))
    assert filled / (20 * 4 * 401) > 0.9


def test_a_run_continues_within_a_block_and_on_other_ranks(opened: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = opened(write(tmp_path / "a.jsonl", rows_of(MADE)), write(tmp_path / "b.jsonl", rows_of(MADE[:30])))
    whole = batches(corpus, tokenizer, 30)
    for step in (1, 7, 20):
        later = batches(corpus, tokenizer, 30 - step, cursor=json.loads(json.dumps(whole[step - 1].cursor)))
        assert all(same(a, b) for a, b in zip(whole[step:], later, strict=True))
    halves = [batches(corpus, tokenizer, 30, rank=rank, world=2) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(itertools.chain(*(part.digests for part in parts))) == batch.digests
    cursor = merge_cursors([half[11].cursor for half in halves])
    assert all(same(a, b) for a, b in zip(whole[12:], batches(corpus, tokenizer, 18, cursor=cursor), strict=True))
    named = batch_of_step(corpus, tokenizer, whole[4].cursor, 9, sequences_per_step=4).documents
    assert named == whole[9].documents and {address.file for address in named} <= {"a.jsonl", "b.jsonl"}


def test_a_cursor_of_another_template_is_refused(opened: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = opened(write(tmp_path / "a.jsonl", rows_of(MADE)))
    cursor = batches(corpus, tokenizer, 8)[-1].cursor
    for positions in cursor["lanes"].values():
        positions[0][2] = 1000
    with pytest.raises(CheckpointError, match="window 1000 of a block"):
        batches(corpus, tokenizer, 1, cursor=cursor)


def test_what_is_too_long_is_counted_and_left_out_or_cut(opened: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", rows_of(MADE))
    skipped, cut = opened(path, sequence_length=40), opened(path, sequence_length=40, too_long="truncate")
    lengths = [
        encode(tokenizer, json.loads(document.text)["messages"]) for document in skipped.documents(held_out=False)
    ]
    long = sum(len(ids) > 41 for ids, _ in lengths)
    found, other = survey(skipped, tokenizer), survey(cut, tokenizer)
    assert found.too_long == other.too_long == long > 5
    assert found.conversations == len(lengths) - long
    # Of what is cut, that is used of which a part of an answer is left.
    assert other.conversations == sum(any(answers[:41]) for _, answers in lengths)
    assert f"{long} longer than 41 tokens left out (data.too_long=skip)" in found.report(skipped.config)
    for batch in batches(cut, tokenizer, 6):
        assert all(any(learned) and len(ids) <= 41 for ids, learned in pieces(batch))
    with pytest.raises(DataError, match=r"no conversation of at most 4 tokens(.|\n)*too_long=truncate"):
        batches(opened(path, sequence_length=3), tokenizer, 1)


def test_all_tokens_are_learned_where_asked(opened: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = opened(write(tmp_path / "a.jsonl", rows_of(MADE)), loss_on="all")
    for ids, learned in pieces(batches(corpus, tokenizer, 1)[0]):
        assert learned == [False] + [True] * (len(ids) - 1)


def test_a_conversation_that_the_template_refuses_is_named(opened: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    strict = Tokenizer(tokenizer.backend, {**tokenizer.config, "chat_template": source})
    rows = [*rows_of(MADE[:30]), {"messages": [SYSTEM, QUESTION, ANSWER]}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a.jsonl, row group 0, row 30: .*no system"):
        survey(opened(path, holdout=0), strict)
    corpus = opened(path, holdout=0, on_error="skip", lanes=1)
    assert survey(corpus, strict).conversations == sum(
        len(encode(tokenizer, messages)[0]) <= LENGTH + 1 for messages in MADE[:30]
    )
    found = batches(corpus, strict, 12)
    assert all("no system" in row.problem for batch in found for row in batch.left_out)
    assert sum(found[-1].bad_rows.values()) >= 1
    # What a block leaves out is counted once, wherever a run is interrupted.
    for step in (1, 5):
        assert batches(corpus, strict, 12 - step, cursor=found[step - 1].cursor)[-1].bad_rows == found[-1].bad_rows


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), max_size=40))
def test_best_fit_loses_nothing_and_wastes_little(lengths: list[int]) -> None:
    bins = best_fit(lengths, 30)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in members) for members in bins]
    assert all(0 < total <= 30 for total in sums)
    # No two windows could have been one.
    smallest: Callable[[int], list[int]] = lambda n: sorted(sums)[:n]  # noqa: E731
    assert len(sums) < 2 or sum(smallest(2)) > 30
