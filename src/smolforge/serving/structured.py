"""Structured output in OpenAI's forms: `response_format`, `tools` and `tool_choice`; answers that are calls of tools.

A grammar decides what can be written (`generation/grammar.py`), so JSON is always of its schema and a call is always
one of a given tool with arguments of its schema, whatever the model. The conversation tells the model about the tools
in text, since most templates of small models know none; a call is written as Hermes and Qwen models do:

    <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smolforge.generation.grammar import Grammar, GrammarCompiler, json_rule
from smolforge.serving.errors import refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smolforge.serving.schemas import Message

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TOOLS = """You can call these functions:

{functions}

To call one, answer only with {open}{{"name": FUNCTION, "arguments": ARGUMENTS}}{close}."""


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class TextFormat(_Shape):
    """Free text."""

    type: Literal["text"]


class JsonObject(_Shape):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(_Shape):
    """A schema with a name; `strict` changes nothing, as every answer is of its schema."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(_Shape):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class FlatJsonSchemaFormat(JsonSchema):
    """JSON of a schema, as /v1/responses writes it."""

    type: Literal["json_schema"]


ResponseFormat = Annotated[TextFormat | JsonObject | JsonSchemaFormat, Field(discriminator="type")]
TextOutputFormat = Annotated[TextFormat | JsonObject | FlatJsonSchemaFormat, Field(discriminator="type")]


class Function(_Shape):
    """A function that the model may call; `strict` changes nothing."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Shape):
    """A function among the tools of a chat."""

    type: Literal["function"]
    function: Function


class FlatTool(Function):
    """A function among the tools of /v1/responses."""

    type: Literal["function"]


class Called(_Shape):
    """A function that an earlier answer called; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(_Shape):
    """A call in an earlier answer of a chat."""

    id: str
    type: Literal["function"] = "function"
    function: Called


class Name(_Shape):
    """The name of a function."""

    name: str


class NamedTool(_Shape):
    """The tool that must be called."""

    type: Literal["function"]
    function: Name


class FlatNamedTool(Name):
    """The tool that must be called, as /v1/responses writes it."""

    type: Literal["function"]


ToolChoice = Literal["none", "auto", "required"]


@dataclass
class Demand:
    """What an answer has to be."""

    schema: dict[str, Any] | None = None  # of the JSON that the text is; None for free text
    functions: list[Function] = field(default_factory=list)  # that may be called
    must_call: bool = False  # the answer has to be a call
    parallel: bool = True  # it may be several

    @classmethod
    def of(
        cls,
        form: TextFormat | JsonObject | JsonSchemaFormat | FlatJsonSchemaFormat | None,
        functions: Sequence[Function],
        choice: ToolChoice | NamedTool | FlatNamedTool | None,
        parallel: bool | None,
    ) -> Demand:
        """From the fields of a request; ApiError 400 where they contradict each other."""
        schema = None
        if isinstance(form, JsonObject):
            schema = {"type": "object"}
        elif isinstance(form, (JsonSchemaFormat, FlatJsonSchemaFormat)):
            schema = (form.json_schema if isinstance(form, JsonSchemaFormat) else form).schema_ or {}
        allowed = {function.name: function for function in functions}
        if len(allowed) < len(functions):
            raise refused("tools", "two functions have the same name")
        name = choice.function.name if isinstance(choice, NamedTool) else getattr(choice, "name", None)
        if name is not None:
            if name not in allowed:
                raise refused("tool_choice", f"{name!r} is none of the tools")
            allowed = {name: allowed[name]}
        elif choice == "required" and not allowed:
            raise refused("tool_choice", "requires a call, and there are no tools")
        elif choice == "none":
            allowed = {}
        return cls(schema, list(allowed.values()), name is not None or choice == "required", parallel is not False)

    def grammar(self, compiler: GrammarCompiler) -> Grammar | None:
        """The grammar of the answer, or None for free text; BadInput where it cannot be followed."""
        if not self.functions:
            return compiler.json_schema(self.schema) if self.schema is not None else None
        names = [f"call{i}" for i in range(len(self.functions))]
        rules = [f"calls: ({' | '.join(names)}){'+' if self.parallel else ''}"]
        for rule, function in zip(names, self.functions, strict=True):
            rules.append(f"{rule}: {json.dumps(_head(function.name))} {rule}_arguments {json.dumps('}' + CLOSE)}")
            rules.append(f"{rule}_arguments: {json_rule(function.parameters or {'type': 'object', 'properties': {}})}")
        if self.schema is not None:
            rules.append(f"text: {json_rule(self.schema)}")
        elif not self.must_call:
            rules.append(r"text: /([^<](.|\n)*)?/")
        rules.append("start: calls" if self.must_call else "start: calls | text")
        return compiler.lark("\n".join(reversed(rules)) + "\n", field="tools")

    def instruct(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation with a description of the tools in its system message."""
        if not self.functions:
            return messages
        fields = {"name", "description", "parameters"}
        lines = (json.dumps(f.model_dump(include=fields), ensure_ascii=False) for f in self.functions)
        told = _TOOLS.format(functions="\n".join(lines), open=OPEN, close=CLOSE)
        if messages[0]["role"] == "system":
            return [{"role": "system", "content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
        return [{"role": "system", "content": told}, *messages]


def _head(name: str) -> str:
    """How a call of a function begins, up to its arguments."""
    return f'{OPEN}{{"name": {json.dumps(name)}, "arguments": '


@dataclass
class Call:
    """A call of a function; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_json(self) -> dict[str, Any]:
        """As an assistant message of a chat has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallReader:
    """Takes the text of an answer as it is written and finds the calls in it; without functions it is only text."""

    def __init__(self, demand: Demand) -> None:
        self._may_call = bool(demand.functions)
        self._rest = ""
        self.calls: list[Call] = []

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text that may be shown now, and the calls that this text completes."""
        if not self._may_call:
            return text, []
        self._rest += text
        if not self.calls and self._rest and not self._rest.startswith("<"):
            self._may_call = False  # the grammar lets only calls begin so
            return self.flush(), []
        found = []
        while CLOSE in self._rest:
            try:
                value, end = json.JSONDecoder().raw_decode(self._rest, len(OPEN))
            except (ValueError, RecursionError):
                break  # the mark is part of a string of the arguments, or they are nested a thousand times
            if not self._rest.startswith(CLOSE, end):
                break
            # As they were written: decoded, an escape of a lone surrogate could not be sent.
            before = len(_head(value["name"]))
            found.append(Call(value["name"], self._rest[before : end - 1]))
            self._rest = self._rest[end + len(CLOSE) :]
        self.calls += found
        return "", found

    def flush(self) -> str:
        """At the end: the text of a call that was cut off."""
        rest, self._rest = self._rest, ""
        return rest


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as every chat template takes them: calls are text, and their results come from the user."""
    found: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
        more = message.model_extra if message.role != "tool" else None
        content = message.text()
        for call in message.tool_calls or ():
            content += f"{_head(call.function.name)}{call.function.arguments or '{}'}}}{CLOSE}"
        if message.role == "tool":
            content = f"<tool_response>{content}</tool_response>"
            if was_result:
                found[-1]["content"] += f"\n{content}"
                continue
        was_result = message.role == "tool"
        found.append({**(more or {}), "role": role, "content": content})
    return found
