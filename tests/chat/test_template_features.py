"""What templates of the Hub use is rendered as transformers renders it: 18 templates, ten conversations each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, SPECIALS, TEMPLATES

from smolforge.chat_template import ChatTemplate
from smolforge.errors import BadInput
from smolforge.tokenizer import Tokenizer

EACH = "{% for message in messages %}"
TURN = "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}"
FEATURES = {
    "generation": EACH + "{% generation %}" + TURN + "{% endgeneration %}{% endfor %}",
    "break": EACH + "{% if loop.index0 > 2 %}{% break %}{% endif %}" + TURN + "{% endfor %}",
    "continue": EACH + "{% if message.role == 'system' %}{% continue %}{% endif %}" + TURN + "{% endfor %}",
    "year": "{{ strftime_now('%Y %B') }}" + EACH + TURN + "{% endfor %}",
    "special tokens": "{{ pad_token }}|{{ unk_token }}|{{ bos_token }}|{{ sep_token }}|" + EACH + TURN + "{% endfor %}",
    "missing": "{% if sep_token is defined %}defined{% else %}missing{% endif %}" + EACH + TURN + "{% endfor %}",
    "name": EACH + "{{ message.name if message.name is defined else message['role'] }}{{ message.content }}{% endfor %}",
    "keys": EACH + "{{ message.get('reasoning_content', '-') }}{{ message.weight }}{{ message.content }}{% endfor %}",
    "tools": "{% if tools is none %}none{% endif %}{% if not tools %}no tools{% endif %}" + EACH + TURN + "{% endfor %}",
    "documents": "{% if documents %}some{% else %}no documents{% endif %}" + EACH + TURN + "{% endfor %}",
    "date": "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}"
    + EACH + TURN + "{% endfor %}",
    "namespace": "{% set ns = namespace(found=0) %}" + EACH + "{% set ns.found = ns.found + 1 %}{% endfor %}{{ ns.found }}",
    "json": EACH + "{{ message | tojson }}{{ message | tojson(indent=2) }}{{ message | tojson(true) }}{% endfor %}",
    "macro": "{% macro turn(m) %}<{{ m.role | upper }}>{{ m.content | trim }}{% endmacro %}" + EACH
    + "{{ turn(message) }}{% endfor %}",
    "blocks": "{%- for message in messages %}\n    {%- if message.content %}\n    {{ message.content }}\n"
    "    {% endif %}\n{% endfor %}\n",
    "refusal": EACH + "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURN + "{% endfor %}",
    "slices": "{{ messages[0].content[:7] }}{{ messages[-1]['content'].split('a') | join('|') }}{{ messages | length }}",
    "chatml": CHATML,
}  # fmt: skip
USER, ANSWER = {"role": "user", "content": "What is a cat?"}, {"role": "assistant", "content": "An animal."}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER], [USER, ANSWER, USER], [{"role": "system", "content": "Be brief."}, USER], [{**USER, "name": "Ann"}],
    [{**USER, "weight": 2, "name": "Bo"}, {**ANSWER, "reasoning_content": "hm"}, USER],
    [{"role": "user", "content": "  blanks \n\n"}], [{"role": "user", "content": "東京 🙂 \u2028 <b>&amp;</b> \"q\""}],
    [USER, ANSWER, USER, ANSWER, USER], [{"role": "tool", "content": "{\"a\": [1, 2]}", "tool_call_id": "x"}, USER],
    [{"role": "user", "content": ""}, {**ANSWER, "content": "a banana"}, USER],
]  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {"eos_token": "</s>"},
    {"eos_token": {"content": "</s>", "special": True}, "bos_token": "<s>", "pad_token": "<|im_end|>", "unk_token": "<s>"},
]  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    made = Tokenizer.train(["what is a cat an animal be brief banana user assistant system"] * 5, 400)
    made.backend.add_special_tokens(SPECIALS)
    return made


def ids_of(theirs: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """The ids that the tokenizer of transformers, 4 or 5, makes of a conversation."""
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


@pytest.mark.parametrize("config", CONFIGS, ids=["few special tokens", "all special tokens"])
@pytest.mark.parametrize("name", FEATURES)
def test_templates_are_rendered_as_by_transformers(trained: Tokenizer, tmp_path: Path, name: str, config: Any) -> None:
    from transformers import PreTrainedTokenizerFast, __version__

    settings = {**config, "chat_template": FEATURES[name]}
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in settings.items()}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **texts)
    ours = ChatTemplate(Tokenizer(trained.backend, settings))
    for messages in CONVERSATIONS:
        if name == "json" and __version__ < "5" and any("reasoning_content" in message for message in messages):
            continue  # version 4 gives the template no `thinking` beside it, as version 5 and smolforge do
        for prompt in (True, False):
            try:
                expected = ids_of(theirs, messages, add_generation_prompt=prompt)
            except Exception:
                with pytest.raises(BadInput, match="refuses this conversation"):
                    ours.encode(messages, generation_prompt=prompt)
                continue
            assert ours.encode(messages, generation_prompt=prompt) == expected, (messages, prompt)


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "zephyr", "smollm2", "gemma"])
def test_a_begun_answer_is_continued_as_by_transformers(trained: Tokenizer, tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    settings = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATES[name][0]}
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **settings)
    ours = ChatTemplate(Tokenizer(trained.backend, settings))
    for text in ("An animal", "An animal ", " An\n", "What is a cat?", "the <b>", "  An", "<", "i", "d", "s>"):
        messages = [USER, {"role": "assistant", "content": text}]
        expected = ids_of(theirs, messages, continue_final_message=True)
        assert ours.encode(messages) == expected, text
    assert ours.encode([USER, {"role": "assistant", "content": ""}]) == ours.encode([USER])


THINKS = {
    "asked for": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
    "by default": "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% if enable_thinking %}/think{% else %}/no_think{% endif %}",
    "inside a loop": EACH + "{% if loop.last and level == 'low' %}{{ extra.facts | join(',') }}{% endif %}{% endfor %}",
    "documents": "{% for one in documents or [] %}{{ one.title }}{% endfor %}",
}  # fmt: skip
VARIABLES: list[dict[str, Any]] = [
    {}, {"enable_thinking": True}, {"enable_thinking": False}, {"level": "low", "extra": {"facts": ["a", "b"]}},
    {"documents": [{"title": "A cat"}, {"title": "b"}]},
]  # fmt: skip


@pytest.mark.parametrize("name", THINKS)
def test_variables_reach_the_template_as_in_transformers(trained: Tokenizer, tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    settings = {"eos_token": "</s>", "chat_template": THINKS[name] + EACH + TURN + "{% endfor %}"}
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **settings)
    ours = ChatTemplate(Tokenizer(trained.backend, settings))
    taken = 0
    for variables in VARIABLES:
        if not all(variable in THINKS[name] for variable in variables):
            with pytest.raises(BadInput, match="is not read by the chat template of this model"):
                ours.encode([USER], variables=variables)
            continue
        expected = ids_of(theirs, [USER, ANSWER, USER], **variables)
        assert ours.encode([USER, ANSWER, USER], variables=variables) == expected, variables
        taken += 1
    assert taken > 1


def test_variables_bring_no_special_tokens_and_replace_nothing(trained: Tokenizer) -> None:
    source = "{{ bos_token }}{{ who }}" + EACH + TURN + "{% endfor %}"
    template = ChatTemplate(
        Tokenizer(trained.backend, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": source})
    )
    ids = template.encode([USER], variables={"who": "<s>me</s>"})
    assert [ids.count(trained.backend.token_to_id(text)) for text in ("<s>", "</s>")] == [1, 1]
    for name in ("bos_token", "messages", "tools", "add_generation_prompt", "strftime_now"):
        with pytest.raises(BadInput, match="is not a variable to set") as error:
            template.encode([USER], variables={name: "x"})
        assert "It reads who." in str(error.value.hint)


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "smollm2"])
def test_what_is_rendered_and_what_is_continued_can_be_chosen(trained: Tokenizer, tmp_path: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    settings = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATES[name][0]}
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **settings)
    ours = ChatTemplate(Tokenizer(trained.backend, settings))
    for messages in ([USER], [USER, ANSWER]):
        for prompt in (True, False):
            expected = ids_of(theirs, messages, add_generation_prompt=prompt)
            assert ours.encode(messages, generation_prompt=prompt, continued=False) == expected
        expected = ids_of(theirs, messages, continue_final_message=True)
        assert ours.encode(messages, continued=True) == expected
    called = [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]
    expected = ids_of(theirs, called, add_generation_prompt=True)
    assert ours.encode(called) == expected  # the call is not left out
    with pytest.raises(BadInput, match="no text that can be continued"):
        ours.encode([{"role": "user", "content": " "}], continued=True)


def test_quoted_special_tokens_stay_where_the_template_puts_them(trained: Tokenizer) -> None:
    """Each has a mark of its own: what a template skips, repeats, reorders or writes in capitals stays right."""
    texts = ["<s> one </s>", "two <|im_end|>", "three <|user|>"]
    messages = [{"role": "user", "content": text} for text in texts]

    def filled(source: str) -> str:
        template = ChatTemplate(Tokenizer(trained.backend, {"eos_token": "</s>", "chat_template": source}))
        ids = template.encode(messages)
        assert not set(ids) & trained.special_ids
        return trained.decode(ids)

    assert filled("{{ messages[2].content }}{{ messages[0].content }}") == texts[2] + texts[0]
    assert filled("{{ messages[1].content * 2 }}") == texts[1] * 2
    assert filled("{% for m in messages | reverse %}{{ m.content | upper }}{% endfor %}") == (
        "THREE <|user|>TWO <|im_end|><s> ONE </s>"
    )
    assert filled("{{ messages[1].content[:5] }}") == texts[1] and filled("{{ messages[1].content[5:] }}") == ""
    assert filled("{{ messages[0].content | reverse }}") == "</s> eno <s>"
    assert filled("{{ messages[1].content | tojson }}") == '"two <|im_end|>"'
    for escaped in ("messages[1].content | tojson(true)", "messages[1]", "messages[1].content | urlencode"):
        with pytest.raises(BadInput, match="escapes special tokens"):
            filled(f"{{{{ {escaped} }}}}")


def test_the_file_of_the_template_comes_before_the_configuration(trained: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    Tokenizer(trained.backend, {"eos_token": "</s>", "chat_template": "{{ 'old' }}"}).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 'new' }}")
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat_template == theirs.chat_template == "{{ 'new' }}"
