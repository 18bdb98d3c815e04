"""/v1/completions: text goes on."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from smolforge.serving.schemas import CompletionRequest
from smolforge.serving.server_request import ServerRequest
from smolforge.serving.state import Service
from smolforge.serving.streaming import DONE, EITHER, EventStream, cancel_on_exit, event
from smolforge.serving.transcript import Entry, Transcript, completion_logprobs

Key = tuple[int, int]  # index of the prompt, index of the choice


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", summary="Continue prompts", responses=EITHER)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        body.check(service.settings.max_n)
        sampling = body.sampling()
        prompts = await prompt_ids(service, body)
        with contextlib.ExitStack() as stack:
            stack.enter_context(service.client(request))
            generation = await service.submit(prompts, sampling)
            stack.enter_context(cancel_on_exit(service.worker, generation, service.settings.request_seconds))
            answer = CompletionAnswer(service, generation, body)
            if body.stream:
                return EventStream(answer.stream(), stack.pop_all())
            return JSONResponse(await answer.whole())

    return routes


async def prompt_ids(service: Service, body: CompletionRequest) -> list[list[int]]:
    """Every form of `prompt` as lists of token ids; no prompt is the beginning of a document, as of OpenAI."""
    prompt: Any = body.prompt
    if prompt is None:
        prompt = [service.tokenizer.eos_id]
    elif isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt[0], int):
        prompt = [prompt]
    service.check_sequences(len(prompt), body.n or 1)
    if isinstance(prompt[0], str):
        return await service.encode_all(prompt)
    return prompt


class CompletionAnswer:
    """The answer to one request, whole or as a stream of chunks."""

    def __init__(self, service: Service, generation: ServerRequest, body: CompletionRequest) -> None:
        self.generation, self.body = generation, body
        self.tokenizer = generation.model.engine.tokenizer
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.source.name,
            "system_fingerprint": fingerprint(generation),
        }

    def _choice(self, key: Key, text: str, entries: list[Entry], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None and (entries or finish_reason):
            logprobs = completion_logprobs(self.tokenizer, entries)
        index = key[0] * self.generation.sampling.n + key[1]
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        transcripts, entries = new_transcripts(self.generation), {}
        async for batch in self.generation.batches():
            for prompt, step in batch:
                key = prompt, step.index
                entries.setdefault(key, []).extend(transcripts[key].push(step))
        choices = [
            self._choice(key, transcript.text, entries[key], transcript.finish_reason)
            for key, transcript in transcripts.items()
        ]
        return {**self.head, "choices": choices, "usage": self.generation.describe()}

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as events; all that came at once goes out at once."""
        transcripts = new_transcripts(self.generation)
        more = {"usage": None} if self.body.include_usage else {}
        async for batch in self.generation.batches():
            out = bytearray()
            for prompt, step in batch:
                key = prompt, step.index
                entries = transcripts[key].push(step)
                if step.text or entries or step.finish_reason:
                    choice = self._choice(key, step.text, entries, step.finish_reason)
                    out += event({**self.head, "choices": [choice], **more})
            if out:
                yield bytes(out)
        if self.body.include_usage:
            yield event({**self.head, "choices": [], "usage": self.generation.describe()})
        yield DONE


def new_transcripts(generation: ServerRequest) -> dict[Key, Transcript]:
    """One for each choice of each prompt, in order."""
    tokenizer, n = generation.model.engine.tokenizer, generation.sampling.n
    return {(p, c): Transcript(tokenizer) for p in range(len(generation.prompts)) for c in range(n)}


def fingerprint(generation: ServerRequest) -> str:
    """Which weights wrote it: changes when a newer checkpoint takes over."""
    model = generation.model
    return f"smolforge-step-{model.step}" if model.step is not None else f"smolforge-{model.created}"
