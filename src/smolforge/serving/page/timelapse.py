"""The time-lapse: the same prompt, under the same seed, through a run's checkpoints, oldest first.

One checkpoint at a time is loaded beside the served model and forgotten afterwards, so memory holds two.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from smolforge.errors import SmolforgeError
from smolforge.serving.errors import refused
from smolforge.serving.page.write import Knobs
from smolforge.serving.state import Service
from smolforge.serving.streaming import EventStream, as_api_error, cancel_on_exit, event

MOST = 8


class TimelapseRequest(Knobs):
    """A prompt and the steps to show; a spread over the run unless given."""

    steps: list[int] = Field(default_factory=list, max_length=MOST)


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(include_in_schema=False)
    turn = asyncio.Lock()

    @routes.post("/page/timelapse")
    async def timelapse(body: TimelapseRequest, request: Request) -> Response:
        known = service.source.steps()
        if not known:
            raise refused("steps", "this model belongs to no run with checkpoints")
        strange = [step for step in body.steps if step not in known]
        if strange:
            raise refused("steps", f"there is no checkpoint of step {strange[0]}")
        steps = sorted(set(body.steps)) or spread(known, MOST - 2)
        with contextlib.ExitStack() as stack:
            stack.enter_context(service.client(request))
            return EventStream(_events(service, body, steps, turn), stack.pop_all())

    return routes


def spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of `steps`, first and last among them.

    They are even in the logarithm of the step, since models learn most at the beginning.
    """
    if len(steps) <= count:
        return steps
    low, high = max(1, steps[0]), max(2, steps[-1])
    wanted = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    chosen = {min(steps, key=lambda step, goal=goal: abs(step - goal)) for goal in wanted} | {steps[0], steps[-1]}
    for step in reversed(steps):  # where early checkpoints are few, the latest fill up
        if len(chosen) >= count:
            break
        chosen.add(step)
    return sorted(chosen)


async def _events(
    service: Service, body: TimelapseRequest, steps: list[int], turn: asyncio.Lock
) -> AsyncIterator[bytes]:
    yield event({"steps": steps})
    sampling = body.sampling(None)
    loop = asyncio.get_running_loop()
    settings = service.settings
    async with turn:
        for step in steps:
            yield event({"step": step, "state": "loading"})
            try:
                model = await loop.run_in_executor(
                    service.worker.loader, lambda step=step: service.source.open(quantize=settings.quantize, step=step)
                )
                tokenizer = model.engine.tokenizer
                ids = tokenizer.encode(body.prompt) if body.prompt else [tokenizer.eos_id]
                generation = await service.submit([ids], sampling, model)
            except SmolforgeError as error:  # a checkpoint that was pruned or damaged meanwhile: the others go on
                yield event({"step": step, "state": "failed", "message": as_api_error(error).message})
                continue
            with cancel_on_exit(service.worker, generation, settings.request_seconds):
                async for batch in generation.batches():
                    news: dict[str, Any] = {"step": step, "text": "".join(part.text for _, part in batch)}
                    yield event(news)
            yield event({"step": step, "state": "done"})
    yield event({"end": True})
