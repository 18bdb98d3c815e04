"""A request as the event loop sees it: prompts handed to the worker, steps coming back.

The worker's thread makes steps; `deliver` and `fail` bring them over and run on the event loop, so nothing
here needs a lock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolforge.generation.sampling_params import SamplingParams
    from smolforge.generation.sequence import Request, StepOutput
    from smolforge.serving.models import LoadedModel


class ServerRequest:
    """Some prompts under one `SamplingParams`, and what was written of them so far.

    Attributes:
        prompts: token ids of each.
        sampling: what is wanted of each.
        model: the engine that runs them.
        requests: the engine's own, one for each prompt.
        finished: every choice of every prompt has ended, or it was cancelled or failed.
        first_token: seconds from arrival to the first written token, or None.
    """

    def __init__(self, prompts: list[list[int]], sampling: SamplingParams, model: LoadedModel) -> None:
        self.prompts, self.sampling, self.model = prompts, sampling, model
        self.requests: list[Request] = []
        self.finished = False
        self.first_token: float | None = None
        self.arrived = time.monotonic()
        self.waiting = self.sequences
        self._open = self.sequences
        self._started: set[tuple[int, int]] = set()
        self._index: dict[int, int] = {}
        self._ready: list[tuple[int, StepOutput]] = []
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    @property
    def sequences(self) -> int:
        """Prompts times choices."""
        return len(self.prompts) * self.sampling.n

    @property
    def running(self) -> int:
        """Sequences that have begun and not ended."""
        return 0 if self.finished else self._open - self.waiting

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def completion_tokens(self) -> int:
        """Tokens written so far, over all prompts and choices; an end-of-text token counts."""
        return sum(request.written for request in self.requests)

    def accept(self, requests: list[Request]) -> None:
        """The engine took it."""
        self.requests = requests
        self._index = {request.id: i for i, request in enumerate(requests)}

    def deliver(self, steps: list[StepOutput]) -> None:
        """New steps, in order."""
        for step in steps:
            if (step.request, step.index) not in self._started:
                self._started.add((step.request, step.index))
                self.waiting -= 1
            if self.first_token is None and not step.prompt:
                self.first_token = time.monotonic() - self.arrived
            if step.finish_reason:
                self._open -= 1
            self._ready.append((self._index[step.request], step))
        self.finished = self.finished or self._open == 0
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """Nothing more will come; whoever reads gets `error`."""
        if not self.finished:
            self.finished, self._error = True, error
            self._news.set()

    async def batches(self) -> AsyncIterator[list[tuple[int, StepOutput]]]:
        """(index of the prompt, step), as many as have come, until all have ended.

        Raises:
            BaseException: what `fail` was given.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            ready, self._ready = self._ready, []
            if ready:
                yield ready
            if self._error is not None:
                raise self._error
            if self.finished and not self._ready:
                return

    def describe(self) -> dict[str, Any]:
        """Usage as OpenAI counts it."""
        prompt, written = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
