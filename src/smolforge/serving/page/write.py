"""What the page's script reads while text is written: tokens with their probabilities and alternatives."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from smolforge.generation.sampling_params import SamplingParams
from smolforge.serving.schemas import Text
from smolforge.serving.server_request import ServerRequest
from smolforge.serving.state import Service
from smolforge.serving.streaming import EventStream, cancel_on_exit, event
from smolforge.serving.transcript import token_string
from smolforge.tokenizer import StreamDecoder, Tokenizer

ALTERNATIVES = 5
MAX_TOKENS = 1024


class Knobs(BaseModel):
    """The settings that the page offers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    prompt: Text = ""
    max_tokens: int = Field(default=100, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=0.8, ge=0, le=2)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    seed: int | None = Field(default=None, ge=0, le=2**53 - 1)

    def sampling(self, logprobs: int | None) -> SamplingParams:
        """As the engine wants it."""
        return SamplingParams(**self.model_dump(exclude={"prompt", "ids", "steps"}), logprobs=logprobs)


class WriteRequest(Knobs):
    """A prompt, and the tokens after it that are kept: all of them to continue, some and another one to branch."""

    ids: list[int] = Field(default_factory=list, max_length=1 << 17)


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/page/state")
    async def state() -> dict[str, Any]:
        worker, source = service.worker, service.source
        model = worker.model
        return {
            "model": source.name,
            "ready": model is not None and worker.problem is None,
            "problem": worker.problem or (None if model else service.loading),
            "context": model.engine.context if model else None,
            "step": model.step if model else None,
            "steps": source.steps(),
            "follows": source.follows,
            "run": source.run.path.name if source.run else None,
            "waiting": worker.waiting,
            "key": service.settings.api_key is not None,
        }

    @routes.post("/page/write")
    async def write(body: WriteRequest, request: Request) -> Response:
        sampling = body.sampling(ALTERNATIVES)
        ids = await prompt_ids(service, body.prompt)
        with contextlib.ExitStack() as stack:
            stack.enter_context(service.client(request))
            generation = await service.submit([ids + body.ids], sampling)
            stack.enter_context(cancel_on_exit(service.worker, generation, service.settings.request_seconds))
            return EventStream(_events(generation, body.ids), stack.pop_all())

    return routes


async def prompt_ids(service: Service, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one is the beginning of a document."""
    return await service.encode(prompt) if prompt else [service.tokenizer.eos_id]


async def _events(generation: ServerRequest, kept: list[int]) -> AsyncIterator[bytes]:
    model = generation.model
    tokenizer, context = model.engine.tokenizer, model.engine.context
    prompt = len(generation.prompts[0]) - len(kept)
    yield event({"start": {"prompt": prompt, "context": context, "step": model.step}})
    decoder = tokenizer.stream()
    for token_id in kept:  # so that a character that began before goes on
        decoder.push(token_id)
    async for batch in generation.batches():
        tokens, finish = [], None
        for _, step in batch:
            finish = step.finish_reason or finish
            if step.token_id is not None and step.token_id not in model.engine.eos_ids:
                tokens.append(_token(tokenizer, decoder, step.token_id, step.logprob, step.top_logprobs))
        news: dict[str, Any] = {"tokens": tokens}
        if finish:
            news["finish"] = finish
            news["rest"] = decoder.flush()
        yield event(news)


def _token(
    tokenizer: Tokenizer, decoder: StreamDecoder, token_id: int, logprob: float | None, top: tuple
) -> dict[str, Any]:
    others = [[i, token_string(tokenizer, i), round(lp, 4)] for i, lp in top]
    return {"id": token_id, "text": decoder.push(token_id), "p": round(logprob or 0.0, 4), "top": others}


async def write_for_gradio(service: Service, prompt: str, max_tokens: int, temperature: float, top_p: float):
    """The seed's own function, for gradio_client: the text so far, prompt first."""
    knobs = Knobs(prompt=prompt, max_tokens=int(max_tokens), temperature=float(temperature), top_p=float(top_p))
    ids = await prompt_ids(service, knobs.prompt)
    generation = await service.submit([ids], knobs.sampling(None))
    text = knobs.prompt
    with cancel_on_exit(service.worker, generation, service.settings.request_seconds):
        async for batch in generation.batches():
            text += "".join(step.text for _, step in batch)
            yield text
