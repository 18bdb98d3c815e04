"""Structured output and /v1/responses as the official client uses them, against a real server of a tiny model."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from pydantic import BaseModel, Field

openai = pytest.importorskip("openai", reason="the extra dev is not installed")
pytest.importorskip("llguidance", reason="the extra web is not installed")

ASK = [{"role": "user", "content": "Tell me about the fox."}]


class Animal(BaseModel):
    """What is asked for: of a bounded length, since a tiny model writes strings without end."""

    kind: Literal["fox", "bear", "naïve owl ✨"]
    legs: int = Field(ge=0, le=99)
    tame: bool
    friends: list[Literal["fox", "bear"]] = Field(max_length=2)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "animal", "schema": Animal.model_json_schema()}}


def tool(name: str, **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": parameters}}


TOOLS = [
    tool("find", place={"enum": ["forest", "cave"]}),
    tool("count", most={"type": "integer", "maximum": 9, "minimum": 0}),
]


def check_call(call) -> None:
    arguments = json.loads(call.arguments)
    if call.name == "find":
        assert list(arguments) == ["place"] and arguments["place"] in ("forest", "cave")
    else:
        assert call.name == "count" and list(arguments) == ["most"] and 0 <= arguments["most"] <= 9


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.mark.parametrize("seed", range(3))
def test_parse_gives_an_object_of_the_class(client, seed) -> None:
    found = client.chat.completions.parse(model="tiny-chat", messages=ASK, response_format=Animal, seed=seed)
    assert found.choices[0].finish_reason == "stop"
    assert isinstance(found.choices[0].message.parsed, Animal)


def test_a_stream_gives_the_same(client) -> None:
    options = {"model": "tiny-chat", "messages": ASK, "response_format": Animal, "seed": 5}
    with client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion().choices[0].message
    assert "content.delta" in kinds and "content.done" in kinds
    assert streamed.parsed == client.chat.completions.parse(**options).choices[0].message.parsed


def test_json_object_and_completions(client, server) -> None:
    """A tiny model's object may be cut off; what is there begins one."""
    asked = {"response_format": {"type": "json_object"}, "max_tokens": 40, "seed": 1}
    text = client.chat.completions.create(model="tiny-chat", messages=ASK, **asked).choices[0].message.content
    assert text.startswith("{")
    found = server.post("/v1/completions", {"prompt": "Once", "response_format": SCHEMA, "max_tokens": 100, "n": 2})
    for choice in found.json()["choices"]:
        Animal.model_validate_json(choice["text"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "count"}}])
def test_a_call_that_is_required_is_made(client, choice) -> None:
    options = {"model": "tiny-chat", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "seed": 2}
    answer = client.chat.completions.create(**options, parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    check_call(call.function)
    assert choice == "required" or call.function.name == "count"
    with client.chat.completions.stream(**options, parallel_tool_calls=False) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [c.function.model_dump(include={"name", "arguments"}) for c in streamed.message.tool_calls] == [
        call.function.model_dump(include={"name", "arguments"})
    ]
    # The result goes back as the client has it.
    result = {"role": "tool", "tool_call_id": call.id, "content": "three of them"}
    again = [*ASK, answer.message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(**{**options, "messages": again, "tool_choice": "none"}, max_tokens=3)


def test_a_call_that_is_optional_is_text_or_calls(client) -> None:
    kinds = set()
    for seed in range(4):
        options = {"model": "tiny-chat", "messages": ASK, "tools": TOOLS, "seed": seed, "max_tokens": 60}
        answer = client.chat.completions.create(**options).choices[0]
        for call in answer.message.tool_calls or ():
            check_call(call.function)
        kinds.add(bool(answer.message.tool_calls))
        parts = [
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)
        ]
        assert "".join(parts) == (answer.message.content or "")
    assert False in kinds, "a model that knows no tools writes text"


def test_the_tools_are_told_to_the_model(client) -> None:
    def prompt(**more) -> int:
        options = {"model": "tiny-chat", "messages": ASK, "max_tokens": 1, **more}
        return client.chat.completions.create(**options).usage.prompt_tokens

    assert prompt(tools=TOOLS) > prompt(tools=TOOLS[:1]) > prompt() == prompt(tools=TOOLS, tool_choice="none")


def test_responses_give_text_and_objects_of_a_class(client) -> None:
    options = {"model": "tiny-chat", "input": "Tell me about the fox.", "instructions": "Be brief."}
    plain = client.responses.create(**options, max_output_tokens=5, extra_body={"seed": 3})
    assert plain.status == "incomplete" and plain.incomplete_details.reason == "max_output_tokens"
    assert plain.output_text and plain.usage.output_tokens == 5
    found = client.responses.parse(**options, text_format=Animal, extra_body={"seed": 3})
    assert found.status == "completed" and isinstance(found.output_parsed, Animal)


def test_the_events_of_responses_build_the_response(client) -> None:
    options = {"model": "tiny-chat", "input": ASK, "extra_body": {"seed": 4}}
    events = list(client.responses.create(**options, max_output_tokens=20, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        type(event).model_validate(event.model_dump(by_alias=True))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", events[-1].type,
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert (
        events[-1].response.output_text == text == client.responses.create(**options, max_output_tokens=20).output_text
    )
    with client.responses.stream(**options, text_format=Animal) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Animal)


def test_responses_call_functions_and_take_their_results(client) -> None:
    flat = [{**one["function"], "type": "function", "strict": True} for one in TOOLS]
    options = {"model": "tiny-chat", "tools": flat, "tool_choice": "required", "extra_body": {"seed": 6}}
    found = client.responses.create(**options, input=ASK)
    calls = [item for item in found.output if item.type == "function_call"]
    assert calls and len(calls) == len(found.output)
    for call in calls:
        check_call(call)
    events = list(client.responses.create(**options, input=ASK, stream=True))
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [(item.name, item.arguments) for item in done] == [(call.name, call.arguments) for call in calls]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in calls]
    rest = {**options, "tool_choice": "none"}
    assert client.responses.create(**rest, input=[*ASK, *found.output, *results], max_output_tokens=4).output_text


ARGUMENTS = [
    '{"text": "</tool_call>", "more": {"a": [1, "}"]}}', '{"text": "\\ud800 \\u00e9 é"}', "{}", '{"x": 1.50e3}', '"}</tool_call>"',
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_are_found_in_any_pieces_and_stay_as_written(size: int) -> None:
    from smolforge.serving.structured import CallReader, Demand, Function

    text = "".join(f'<tool_call>{{"name": "f{i}", "arguments": {a}}}</tool_call>' for i, a in enumerate(ARGUMENTS))
    reader = CallReader(Demand(functions=[Function(name="f0")]))
    shown, found = "", []
    for at in range(0, len(text), size):
        part, calls = reader.push(text[at : at + size])
        shown, found = shown + part, found + calls
    assert [(call.name, call.arguments) for call in found] == [(f"f{i}", a) for i, a in enumerate(ARGUMENTS)]
    assert shown + reader.flush() == "" and len({call.id for call in found}) == len(found)
    json.dumps([call.to_json() for call in found], ensure_ascii=False).encode()


def test_a_call_that_is_cut_off_or_nested_too_deep_stays_text() -> None:
    from smolforge.serving.structured import CallReader, Demand, Function

    deep = "[" * 100_000 + "]" * 100_000
    for text in ('<tool_call>{"name": "f", "argum', f'<tool_call>{{"name": "f", "arguments": {deep}}}</tool_call>'):
        reader = CallReader(Demand(functions=[Function(name="f")]))
        assert reader.push(text) == ("", []) and reader.flush() == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"response_format": {"type": "json"}}, "response_format"),
        ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
         "response_format"),
        ("chat/completions", {"tools": [tool("a b")]}, "tools"),
        ("chat/completions", {"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ("chat/completions", {"tools": [tool("a", x={"type": "string", "pattern": "(?=x)"})]}, "tools"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
        ("chat/completions", {"response_format": {"type": "json_object"}, "min_tokens": 4}, "grammar"),
        ("responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}}, "response_format"),
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ("responses", {"store": True}, "store"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_name(server, path, body, param) -> None:
    about = {"messages": ASK} if path.startswith("chat") else {"input": "x"}
    answer = server.post(f"/v1/{path}", {**about, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": "a", "logit_bias": 3}, "logit_bias: must be a mapping"),
        ("chat/completions", {"messages": [3]}, "messages.0: must be a mapping"),
        ("chat/completions", {"messages": 3}, "messages: must be a list"),
        ("chat/completions", {"messages": []}, "messages: must have at least 1 item"),
        ("chat/completions", {}, "messages: is required"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]},
         "messages.0.content: must be a string, or a list"),
        ("completions", {"prompt": "a", "response_format": {"type": "xml"}},
         "response_format: 'type' must be 'text', 'json_object', 'json_schema', not 'xml'"),
        ("responses", {"input": 3}, "input: must be a string, or a list"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input.0.content.0.type: must be 'input_text', 'output_text' or 'text'"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_place_and_what_is_right(server, path, body, message) -> None:
    assert server.post(f"/v1/{path}", body).json()["error"]["message"] == message


def test_a_completion_model_says_that_it_has_no_chat_template(tiny_run) -> None:
    from serving_fixtures import serving

    with serving(tiny_run) as server:
        answer = server.post("/v1/responses", {"input": "Hello"})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_chat_template"
