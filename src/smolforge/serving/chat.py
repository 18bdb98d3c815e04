"""/v1/chat/completions, where the model has a chat template."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from smolforge.serving.completions import Key, fingerprint, new_transcripts
from smolforge.serving.errors import ApiError, refused
from smolforge.serving.schemas import ChatRequest
from smolforge.serving.server_request import ServerRequest
from smolforge.serving.state import Service
from smolforge.serving.streaming import DONE, EITHER, EventStream, cancel_on_exit, event
from smolforge.serving.transcript import Entry, chat_logprobs
from smolforge.tokenizer import Tokenizer


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", summary="Answer a conversation", responses=EITHER)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        body.check(service.settings.max_n)
        engine = service.model.engine
        if engine.tokenizer.chat_template is None:
            raise ApiError(
                400,
                f"the model {service.source.name!r} has no chat template: it continues text. Use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(service.worker.encoder, fill_template, engine.tokenizer, body)
        sampling = body.sampling(max(1, engine.context - len(ids)))
        with contextlib.ExitStack() as stack:
            stack.enter_context(service.client(request))
            generation = await service.submit([ids], sampling)
            stack.enter_context(cancel_on_exit(service.worker, generation, service.settings.request_seconds))
            answer = ChatAnswer(service, generation, body)
            if body.stream:
                return EventStream(answer.stream(), stack.pop_all())
            return JSONResponse(await answer.whole())

    return routes


def fill_template(tokenizer: Tokenizer, body: ChatRequest) -> list[int]:
    """Token ids of a conversation.

    The template's special tokens are commands, those that a message merely quotes are text: they are replaced by
    marks before the template is filled, and encoded as text afterwards.

    Raises:
        ApiError: the template refuses the conversation.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    specials = [tokenizer.token_text(i) for i in sorted(tokenizer.special_ids)]
    quoted = re.compile("|".join(map(re.escape, filter(None, specials)))) if specials else None
    mark = f"\ue000{secrets.token_hex(16)}\ue001"
    found: list[str] = []

    def protect(match: re.Match[str]) -> str:
        found.append(match[0])
        return mark

    messages = []
    for message in body.messages:
        role = "system" if message.role == "developer" else message.role
        text = message.text()
        messages.append({"role": role, "content": quoted.sub(protect, text) if quoted else text})
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    eos = tokenizer.token_text(tokenizer.eos_id)
    try:
        template = environment.from_string(tokenizer.chat_template or "")
        filled = template.render(
            messages=messages, add_generation_prompt=True, bos_token=_bos(tokenizer) or eos, eos_token=eos, tools=None
        )
    except TemplateError as error:
        raise refused("messages", f"the model's chat template refuses this conversation: {error}") from None
    ids: list[int] = []
    pieces = filled.split(mark)
    for i, piece in enumerate(pieces):
        ids += tokenizer.encode_with_special_tokens(piece) if piece else []
        if i < len(pieces) - 1 and i < len(found):
            ids += tokenizer.encode(found[i])
    return ids


def _bos(tokenizer: Tokenizer) -> str | None:
    token = tokenizer.config.get("bos_token")
    return token.get("content") if isinstance(token, dict) else token


class ChatAnswer:
    """The answer to one conversation, whole or as a stream of chunks."""

    def __init__(self, service: Service, generation: ServerRequest, body: ChatRequest) -> None:
        self.generation, self.body = generation, body
        self.tokenizer = generation.model.engine.tokenizer
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.source.name,
            "system_fingerprint": fingerprint(generation),
        }

    def _logprobs(self, entries: list[Entry]) -> dict[str, Any] | None:
        return chat_logprobs(self.tokenizer, entries) if self.body.logprobs else None

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        transcripts, entries = new_transcripts(self.generation), {}
        async for batch in self.generation.batches():
            for prompt, step in batch:
                key: Key = prompt, step.index
                entries.setdefault(key, []).extend(transcripts[key].push(step))
        choices = [
            {
                "index": key[1],
                "message": {"role": "assistant", "content": transcript.text, "refusal": None},
                "logprobs": self._logprobs(entries[key]),
                "finish_reason": transcript.finish_reason,
            }
            for key, transcript in transcripts.items()
        ]
        return {**self.head, "choices": choices, "usage": self.generation.describe()}

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as events: the role first, then the text, then the end."""
        transcripts = new_transcripts(self.generation)
        head = {**self.head, "object": "chat.completion.chunk"}
        more = {"usage": None} if self.body.include_usage else {}

        def chunk(index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return event({**head, "choices": [choice], **more})

        yield b"".join(chunk(i, {"role": "assistant", "content": ""}, None, None) for _, i in transcripts)
        async for batch in self.generation.batches():
            out = bytearray()
            for prompt, step in batch:
                entries = transcripts[prompt, step.index].push(step)
                if step.text or entries:
                    out += chunk(step.index, {"content": step.text}, self._logprobs(entries), None)
                if step.finish_reason:
                    out += chunk(step.index, {}, None, step.finish_reason)
            if out:
                yield bytes(out)
        if self.body.include_usage:
            yield event({**head, "choices": [], "usage": self.generation.describe()})
        yield DONE
