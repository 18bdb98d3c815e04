"""Chat templates: a conversation as text, as tokens, and which of the tokens the assistant writes.

A template is filled in the environment that transformers has (utils/chat_template_utils.py). Which tokens are the
assistant's is found without markers in the template: the conversation is rendered up to each of its answers, once as a
prompt for it and once with it, and what the second adds to the first is the answer. Where a template makes that
impossible, because it renders an early turn otherwise once later ones follow, the turn is named.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from smolforge.errors import BadInput
from smolforge.formatting import replace_lone_surrogates

if TYPE_CHECKING:
    from jinja2 import Template

    from smolforge.tokenizer import Tokenizer

# ChatML without a default system message, for a model that has no template of its own.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of what the assistant thought
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Variables of a template that a request does not set by name.
_OURS = {"messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception", *_SPECIALS}
# In training a template that asks for the date gets this one, so that a batch does not depend on the day.
_TRAINING_DAY = datetime.datetime(2024, 7, 26)
Message = Mapping[str, Any]


class ChatTokens(NamedTuple):
    """A conversation as token ids, and for each of them whether the assistant writes it."""

    ids: list[int]
    answers: list[bool]


class ChatTemplate:
    """The chat template of a tokenizer.

    Special tokens of the template become single ids. Those that a message only quotes stay plain text: a mark that
    names the token stands for each of them while the template is filled.

    Raises:
        BadInput: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            hint = "`smolforge finetune MODEL --data faq.csv` makes a model that answers."
            raise BadInput("the model has no chat template: it continues text", field="messages", hint=hint)
        self.tokenizer, self.source = tokenizer, tokenizer.chat_template
        self.specials = [text for i in sorted(tokenizer.special_ids) if (text := tokenizer.token_text(i))]
        self._special = re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) or "(?!)")
        # A mark is one character without a meaning, so no filter can change or cut it; which ones, no message knows.
        first = 0x100000 + secrets.randbelow(max(1, 0xFFFD - len(self.specials)))
        self._marks = {text: chr(first + i) for i, text in enumerate(self.specials)}
        self._quoted = {mark: text for text, mark in self._marks.items()}
        self._end = chr(first + len(self.specials))  # the mark of the end of a text that is continued
        self._mark = re.compile(f"[{chr(first)}-{self._end}]")
        # A token that the tokenizer does not name is undefined, as in transformers. One made here ends texts with all.
        made_here = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.token_text(tokenizer.eos_id))
        named = tokenizer.config or made_here
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        self._texts = {key: text for key in _SPECIALS if isinstance(text := texts.get(key), str)}

    def encode(
        self, messages: Sequence[Message], *, tools: Any = None, generation_prompt: bool = True,
        continued: bool | None = None, variables: Mapping[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """Token ids of a conversation; with the generation prompt, up to where the assistant's answer begins.

        Args:
            continued: whether the ids end where the text of the last message ends, so that it is continued. Unless
                given, a last message of the assistant is, where a generation prompt is asked for.
            variables: more for the template to read, such as `enable_thinking`.

        Raises:
            BadInput: the template refuses the conversation, or does not read a variable.
        """
        now, variables = datetime.datetime.now(), self._checked(variables or {})
        last: Message = messages[-1] if messages else {}
        is_answer = last.get("role") == "assistant"
        if continued is None:
            continued = generation_prompt and is_answer and not last.get("tool_calls")
        begun = (last.get("content") or "") if continued else ""
        if continued and (not isinstance(begun, str) or not (begun.strip() or is_answer)):
            raise BadInput("the last message has no text that can be continued", field="messages")
        if not begun.strip():
            if continued:  # nothing of the answer was written yet
                messages, generation_prompt = messages[:-1], True
            return self._tokens(self._render(messages, tools, generation_prompt, now, variables))[0]
        marked = [*messages[:-1], {**last, "content": begun + self._end}]
        head, end, _ = self._render(marked, tools, False, now, variables).rpartition(self._end)
        text = self._render(messages, tools, False, now, variables)
        head = head if text.startswith(head) else head.rstrip()  # blanks are continued where the template keeps them
        if not end or not text.startswith(head):
            raise BadInput("the chat template changes the last message, so it cannot be continued", field="messages")
        return self._tokens(head)[0]

    def encode_answers(self, messages: Sequence[Message], *, tools: Any = None, after: int = 0) -> ChatTokens:
        """Token ids of a whole conversation, and which of them are the assistant's answers, with their end tokens.

        Args:
            after: how many messages at the beginning have no answers that count.

        Raises:
            BadInput: the template refuses the conversation, or a turn makes the answers impossible to find exactly.
        """
        if tools and "tools" not in self.source:
            raise BadInput("the chat template has no place for tools", field="tools")
        whole = self._render(messages, tools, False)
        spans = [
            self._answer(messages, number, whole, tools)
            for number, message in enumerate(messages)
            if message.get("role") == "assistant" and number >= after
        ]
        ids, offsets = self._tokens(whole)
        answers = [any(first < last and end > begin for begin, last in spans) for first, end in offsets]
        return ChatTokens(ids, answers)

    def _answer(self, messages: Sequence[Message], number: int, whole: str, tools: Any) -> tuple[int, int]:
        """Where the answer of message `number` is in the text of the whole conversation."""

        def refuse(why: str) -> BadInput:
            problem = f"the chat template does not tell exactly what the assistant writes in turn {number + 1}: {why}"
            hint = "Use another template, such as ChatML, or conversations that end with this turn."
            return BadInput(problem, field="chat_template", hint=hint)

        before = self._render(messages[:number], tools, True)
        after = whole if number == len(messages) - 1 else self._render(messages[: number + 1], tools, False)
        if not after.startswith(before):
            raise refuse("the prompt for it is not the beginning of the text with it")
        if not whole.startswith(after):
            raise refuse("it is rendered otherwise once later turns follow")
        end = len(after.rstrip())
        if end <= len(before) or not after[:end].endswith(tuple(self.specials)):
            raise refuse("no special token ends it, so a model would not learn to stop")
        return len(before), end

    def _checked(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """`variables` with marks; BadInput for one that the template does not read, or that is not the user's."""
        read = _compiled(self.source)[1] - _OURS
        for name in variables:
            if name not in read:
                why = "is not a variable to set" if name in _OURS else "is not read by the chat template of this model"
                known = f"It reads {', '.join(sorted(read))}." if read else "It reads no variable of this kind."
                raise BadInput(f"{name[:100]!r} {why}", field="chat_template_kwargs", hint=known)
        return {name: self._protect(value) for name, value in variables.items()}

    def _render(
        self, messages: Sequence[Message], tools: Any, generation_prompt: bool, now: datetime.datetime = _TRAINING_DAY,
        variables: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        from jinja2 import TemplateError

        values = {"tools": tools, "documents": None, **self._texts, **(variables or {})}
        try:
            text = _compiled(self.source)[0].render(
                messages=self._protect(messages), add_generation_prompt=generation_prompt, strftime_now=now.strftime,
                **values,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # A template that adds a text to None, or asks for a key of a text, raises Python's own errors.
            raise BadInput(f"the chat template refuses this conversation: {error}", field="messages") from None
        # JSON in ASCII, what Python prints of a list or a dictionary, and the escapes of an address.
        if any(escape in text for m in self._quoted for escape in (json.dumps(m)[1:-1], repr(m)[1:-1], quote(m))):
            raise BadInput("the chat template escapes special tokens that a message quotes", field="messages")
        return text

    def _protect(self, value: Any) -> Any:
        """`value` with a mark for each special token in its texts, and what was thought under the names of all."""
        if isinstance(value, str):
            return self._special.sub(lambda found: self._marks[found[0]], value)
        if isinstance(value, Mapping):
            value = {key: inner if key == "role" else self._protect(inner) for key, inner in value.items()}
            reasoning = next((value[key] for key in _REASONING if value.get(key) is not None), None)
            return value if reasoning is None else {"thinking": reasoning, **value, "reasoning_content": reasoning}
        return [self._protect(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters of `text` that each of them stands for."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for mark in [*self._mark.finditer(text), None]:
            end = mark.start() if mark else len(text)
            encoded = self.tokenizer.encode_with_offsets(replace_lone_surrogates(text[at:end]))
            ids += encoded.ids
            offsets += [(at + first, at + last) for first, last in encoded.offsets]
            if mark:
                quoted = self.tokenizer.encode(str(self._quoted.get(mark[0], mark[0])))
                ids += quoted
                offsets += [mark.span()] * len(quoted)
                at = mark.end()
        return ids, offsets


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[Template, frozenset[str]]:
    """A template, in the environment of transformers, and the names of the variables that it reads."""
    from jinja2 import TemplateError, meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} marks what the assistant writes, for other programs; here it only groups."""

        tags = {"generation"}  # noqa: RUF012 (jinja reads the attribute of the class)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    tags = [GenerationTag, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=tags)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(source), frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except TemplateError as error:
        raise BadInput(f"the chat template is not valid: {error}", field="chat_template") from None
