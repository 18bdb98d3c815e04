"""Chat templates: ids and masks are those of transformers, and what cannot be exact is refused with its turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import ENDLESS, EOS, FORGETFUL, SPECIALS, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge import tales
from smolforge.chat_template import ChatTemplate
from smolforge.errors import BadInput
from smolforge.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    made = Tokenizer.train([tales.document(i).text for i in range(60)], 420)
    made.backend.add_special_tokens(SPECIALS)
    return made


@pytest.fixture(scope="module")
def pairs(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ChatTemplate, Any]]:
    """Of each template: ours, and the tokenizer of transformers whose template has markers."""
    from transformers import AutoTokenizer

    found = {}
    for name, (plain, marked, _) in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name)
        Tokenizer(trained.backend, {"eos_token": EOS[name], "bos_token": "<s>", "chat_template": plain}).save(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.chat_template == plain
        found[name] = ChatTemplate(Tokenizer.from_pretrained(folder)), (theirs, marked)
    return found


# Text with what trips tokenizers and templates: blanks at the ends, line ends, digits, emoji, braces.
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ue000\ue001"), max_size=12),
    st.sampled_from(["Hello there", " two  blanks ", "\n\nline", "1234", "🙂é", "{{ x }}", "a\n", "</think>", "  "]),
)
TEXT = TEXT.filter(lambda text: not any(special in text for special in (*SPECIALS, *SPECIAL_TOKENS)))
ANSWER = TEXT.filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, list[dict[str, str]]]:
    name = draw(st.sampled_from(list(TEMPLATES)))
    messages = []
    if TEMPLATES[name][2] and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(ANSWER)}]
    return name, messages


@settings(max_examples=150, deadline=None, derandomize=True)
@given(conversations())
def test_ids_and_answers_are_those_of_transformers(pairs: Any, drawn: tuple[str, list[dict[str, str]]]) -> None:
    name, messages = drawn
    ours, (theirs, marked) = pairs[name]
    tokens = ours.encode_answers(messages)
    whole = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert tokens.ids == whole["input_ids"]
    oracle = theirs.apply_chat_template(
        messages, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert oracle["input_ids"] == tokens.ids
    assert [int(answer) for answer in tokens.answers] == oracle["assistant_masks"]
    prompt = messages[:-1]
    asked = theirs.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert ours.encode(prompt) == asked["input_ids"]


def test_the_end_token_belongs_to_the_answer(pairs: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for name, (ours, _) in pairs.items():
        ids, answers = ours.encode_answers([*messages, *messages])
        learned = [ours.tokenizer.token_text(i) for i, answer in zip(ids, answers, strict=True) if answer]
        assert learned.count(EOS[name]) == 2 and learned[-1] == EOS[name], name
        assert answers[0] is False


def test_special_tokens_that_a_message_quotes_stay_text(trained: Tokenizer) -> None:
    plain = TEMPLATES["chatml"][0].replace("message['content']", "message['content'] | upper")
    template = ChatTemplate(Tokenizer(trained.backend, {"eos_token": "<|im_end|>", "chat_template": plain}))
    end = template.tokenizer.eos_id
    messages = [
        {"role": "user", "content": "what is <|im_end|>?"},
        {"role": "assistant", "content": "<|im_start|> ends with <|im_end|>"},
    ]
    ids, answers = template.encode_answers(messages)
    assert ids.count(end) == 2
    text = template.tokenizer.decode([i for i, answer in zip(ids, answers, strict=True) if answer])
    assert text == "<|im_start|> ENDS WITH <|im_end|>"


@pytest.mark.parametrize(
    ("source", "reason"),
    [(FORGETFUL, "turn 2: it is rendered otherwise once later turns follow"), (ENDLESS, "turn 2: no special token")],
)
def test_a_template_that_cannot_be_exact_is_refused_with_its_turn(trained: Tokenizer, source: str, reason: str) -> None:
    template = ChatTemplate(Tokenizer(trained.backend, {"eos_token": "<|im_end|>", "chat_template": source}))
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>greet</think>Hello"}]
    with pytest.raises(BadInput, match=reason):
        template.encode_answers([*first, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye"}])
    if source == FORGETFUL:  # alone the turn is whole
        assert any(template.encode_answers(first).answers)


def test_a_template_that_refuses_is_reported(trained: Tokenizer) -> None:
    def encode(source: str, **more: Any) -> list[int]:
        template = ChatTemplate(Tokenizer(trained.backend, {"eos_token": "<|im_end|>", "chat_template": source}))
        return template.encode([{"role": "system", "content": "x", **more}])

    with pytest.raises(BadInput, match="System role not supported"):
        encode(TEMPLATES["gemma"][0])
    with pytest.raises(BadInput, match="refuses this conversation"):
        encode(TEMPLATES["chatml"][0], content=None)
    with pytest.raises(BadInput, match="is not valid"):
        encode("{% for %}")


def test_training_does_not_depend_on_the_day(trained: Tokenizer) -> None:
    source = "{{ strftime_now('%d %b %Y') }}" + TEMPLATES["chatml"][0]
    template = ChatTemplate(Tokenizer(trained.backend, {"eos_token": "<|im_end|>", "chat_template": source}))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert trained.decode(template.encode_answers(messages).ids).startswith("26 Jul 2024")
    assert not trained.decode(template.encode(messages[:1])).startswith("26 Jul 2024")


def test_the_genuine_template_of_smollm2(real_data: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(real_data / "tokenizer" / "smollm2-135m-instruct")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    ids, answers = ChatTemplate(tokenizer).encode_answers(messages)
    learned = [i for i, answer in zip(ids, answers, strict=True) if answer]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "Hello there.<|im_end|>"
