"""/v1/responses, the newer form of OpenAI's chat, for text and calls of functions.

The server keeps no answers, so a request brings its whole conversation (`previous_response_id` is refused). An answer
is a list of items: one message, or the calls of functions.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from smolforge.generation.sampling_params import SamplingParams
from smolforge.serving.engine_thread import ServerRequest
from smolforge.serving.openai_routes import EITHER, answer, chat_defaults, chat_ids
from smolforge.serving.schemas import MAX_MESSAGES, Limit, Message, SampledRequest, StrictModel, Text
from smolforge.serving.state import ServerState
from smolforge.serving.streaming import Transcript, event
from smolforge.serving.structured import (
    Call,
    Called,
    CallReader,
    Demand,
    FlatNamedTool,
    FlatTool,
    TextOutputFormat,
    ToolCall,
    ToolChoice,
    plain_messages,
)  # fmt: skip


class TextPart(StrictModel):
    """A part of a message; only text is supported."""

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(StrictModel):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    def message(self) -> Message:
        """As a chat has it."""
        return Message(role=self.role, content=_joined(self.content))


class InputCall(StrictModel):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def message(self) -> Message:
        """As a chat has it."""
        called = Called(name=self.name, arguments=self.arguments)
        return Message(role="assistant", tool_calls=[ToolCall(id=self.call_id, function=called)])


class CallOutput(StrictModel):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text | list[TextPart]

    def message(self) -> Message:
        """As a chat has it."""
        return Message(role="tool", content=_joined(self.output))


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _kind_of_item(value: Any) -> str | None:
    return value.get("type", "message") if isinstance(value, dict) else None


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")],
    Discriminator(
        _kind_of_item,
        custom_error_type="item",
        custom_error_message="must be a message, a function_call or a function_call_output",
    ),
]


class TextOptions(StrictModel, extra="forbid"):
    """What the text of the answer has to be."""

    format: TextOutputFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(SampledRequest):
    """The body of /v1/responses. Ways of sampling that OpenAI's own API has not are taken as in a chat."""

    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: Limit = None
    text: TextOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: ToolChoice | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None

    def demand(self) -> Demand:
        """What the answer has to be."""
        form = self.text.format if self.text else None
        return Demand.of(form, self.tools or (), self.tool_choice, self.parallel_tool_calls)

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as the chat template reads them."""
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [Message(role="system", content=self.instructions)] if self.instructions else []
        return self.demand().instruct(plain_messages([*messages, *(item.message() for item in items)]))

    def sampling(self, max_n: int, defaults: Mapping[str, Any], **more: Any) -> SamplingParams:
        """As of every request; the limit has another name."""
        most = {} if self.max_output_tokens is None else {"max_tokens": self.max_output_tokens}
        return super().sampling(max_n, defaults, **most, **more)


def router(state: ServerState) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/responses", summary="Answer a conversation", responses=EITHER, tags=["OpenAI"])
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        model = state.model_named(body.model)
        ids = await chat_ids(state, model, body.conversation())
        params = body.sampling(1, chat_defaults(model, ids))
        return await answer(state, model, ResponsesAnswer, body, request, [ids], params)

    return routes


class ResponsesAnswer:
    """The answer to one request: a response object, or the events that build it."""

    def __init__(self, request: ServerRequest, body: ResponsesRequest) -> None:
        self.request, self.body = request, body
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self.reader, self.transcript = CallReader(body.demand()), Transcript()
        self.text, self.started = "", False
        self._events = 0

    async def whole(self) -> dict[str, Any]:
        """The response object."""
        async for batch in self.request.batches():
            for _, step in batch:
                self._push(step)
        return self._response()

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of OpenAI's responses; a call comes as soon as it is complete."""
        begun = {**self._response(), "status": "in_progress", "output": [], "usage": None}
        yield self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)
        async for batch in self.request.batches():
            out = bytearray()
            for _, step in batch:
                text, calls = self._push(step)
                if text:
                    out += self._text_events(text)
                for call in calls:
                    out += self._call_events(call)
            if out:
                yield bytes(out)
        if not self.started and not self.reader.calls:
            yield self._text_events("")  # an empty answer is a message too
        response = self._response()
        yield self._end_of_text() + self._event(f"response.{response['status']}", response=response)

    def _push(self, step: Any) -> tuple[str, list[Call]]:
        self.transcript.push(step)
        text, calls = self.reader.push(step.text)
        text += self.reader.flush() if step.finish_reason else ""
        self.text += text
        return text, calls

    def _response(self) -> dict[str, Any]:
        body, params, usage = self.body, self.request.params, self.request.usage()
        whole = self.transcript.finish_reason != "length"
        output = [_call_item(call, "completed") for call in self.reader.calls]
        if self.text or not output:
            output.append(self._message("completed" if whole else "incomplete"))
        return {
            "id": self.id, "object": "response", "created_at": self.created, "model": self.request.model.name,
            "status": "completed" if whole else "incomplete", "error": None,
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": {},
            "output": output, "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False, "temperature": params.temperature, "top_p": params.top_p,
            "text": {"format": _dumped(body.text.format if body.text else None) or {"type": "text"}},
            "tool_choice": _dumped(body.tool_choice) or "auto", "tools": [_dumped(tool) for tool in body.tools or ()],
            "truncation": "disabled",
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }  # fmt: skip

    def _message(self, status: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": [part]}

    def _event(self, kind: str, **more: Any) -> bytes:
        number, self._events = self._events, self._events + 1
        return f"event: {kind}\n".encode() + event({"type": kind, "sequence_number": number, **more})

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.message_id, "output_index": len(self.reader.calls), "content_index": 0}

    def _text_events(self, text: str) -> bytes:
        place, opening = self._place(), b""
        if not self.started:
            self.started = True
            item = self._message("in_progress")
            part = {**item["content"][0], "text": ""}
            opening = self._event(
                "response.output_item.added", output_index=place["output_index"], item={**item, "content": []}
            )
            opening += self._event("response.content_part.added", **place, part=part)
        return opening + self._event("response.output_text.delta", **place, delta=text, logprobs=[])

    def _end_of_text(self) -> bytes:
        if not self.started:
            return b""
        place = self._place()
        item = self._message("completed" if self.transcript.finish_reason != "length" else "incomplete")
        done = self._event("response.output_text.done", **place, text=self.text, logprobs=[])
        done += self._event("response.content_part.done", **place, part=item["content"][0])
        return done + self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _call_events(self, call: Call) -> bytes:
        index = self.reader.calls.index(call)
        item = _call_item(call, "in_progress")
        place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        out = self._event("response.output_item.added", output_index=index, item={**item, "arguments": ""})
        out += self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        done = {"name": call.name, "arguments": call.arguments}
        out += self._event("response.function_call_arguments.done", **place, **done)
        return out + self._event("response.output_item.done", output_index=index, item=_call_item(call, "completed"))


def _call_item(call: Call, status: str) -> dict[str, Any]:
    named = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": call.id.replace("call_", "fc_"), "type": "function_call", "status": status, **named}


def _dumped(value: Any) -> Any:
    return value.model_dump(by_alias=True) if hasattr(value, "model_dump") else value
