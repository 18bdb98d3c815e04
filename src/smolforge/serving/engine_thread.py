"""The thread that owns the engines, and a request as the event loop sees it.

The event loop hands commands to the thread and gets steps back; neither waits for the other. Several engines can be
alive at once: the served one, an older one that finishes its requests after a newer checkpoint replaced it, and
those of a time-lapse. The thread runs the waiting commands, then one step of each busy engine, and repeats. Weights
are read in a second thread, so that streams continue meanwhile.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from smolforge.errors import SmolforgeError
from smolforge.serving.errors import ApiError, busy, not_ready, shutting_down

if TYPE_CHECKING:
    from smolforge.generation.engine import Engine
    from smolforge.generation.sampling_params import SamplingParams
    from smolforge.generation.sequence import Request, StepOutput
    from smolforge.serving.state import Metrics

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_FAILURES = 3  # failed steps in a row after which the server reports itself as broken
RATE_SECONDS = 10.0


@dataclasses.dataclass(eq=False)
class LoadedModel:
    """An engine and its checkpoint. Only the engine thread steps it."""

    name: str  # in the API
    engine: Engine
    step: int | None  # training step of the checkpoint; None for a model without one
    created: float  # time of the weights file in seconds since the epoch
    # The owners of the engine's requests by their ids, each with the index of its prompt.
    owners: dict[int, tuple[ServerRequest, int]] = dataclasses.field(default_factory=dict)

    @property
    def age(self) -> tuple[float, int]:
        """What is greater for a newer checkpoint: by time first, since a run that begins anew begins at step 0."""
        return self.created, self.step or 0


class ServerRequest:
    """Prompts (token ids) under one `SamplingParams`, and the steps that were written so far.

    All methods run on the event loop, so no lock is needed.
    """

    def __init__(self, prompts: list[list[int]], params: SamplingParams, model: LoadedModel) -> None:
        self.prompts, self.params, self.model = prompts, params, model
        self.requests: list[Request] = []  # the engine's, one for each prompt, set before their first step
        self.finished = False  # every sequence has ended, or the request was cancelled or failed
        self.first_token: float | None = None  # seconds from arrival to the first written token
        self._ended = 0  # sequences
        self._arrived = time.monotonic()
        self._started: set[tuple[int, int]] = set()
        self._ready: list[tuple[int, StepOutput]] = []
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Sequences that have not begun."""
        return len(self.prompts) * self.params.n - len(self._started)

    @property
    def running(self) -> int:
        """Sequences that have begun and not ended."""
        return 0 if self.finished else len(self._started) - self._ended

    def usage(self) -> dict[str, int]:
        """Tokens of prompts and answers as OpenAI counts them; an end-of-text token counts."""
        prompt, written = sum(map(len, self.prompts)), sum(request.written for request in self.requests)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def deliver(self, steps: list[tuple[int, StepOutput]]) -> None:
        """Take new steps, in order, each with the index of its prompt."""
        for _, step in steps:
            self._started.add((step.request, step.index))
            if self.first_token is None and not step.prompt:
                self.first_token = time.monotonic() - self._arrived
            self._ended += step.finish_reason is not None
        self._ready += steps
        self.finished = self.finished or self._ended == len(self.prompts) * self.params.n
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """End the request: the reader gets `error` after the steps that are ready."""
        if not self.finished:
            self.finished, self._error = True, error
            self._news.set()

    async def batches(self) -> AsyncIterator[list[tuple[int, StepOutput]]]:
        """Lists of (index of the prompt, step), each with all that are ready; raises the error that `fail` got."""
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


class EngineThread:
    """Runs requests, while at most `max_queue` sequences wait. The event loop calls everything but `_run`."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.model: LoadedModel | None = None  # the served one; None while it loads
        self.problem: str | None = None  # why nothing can be served
        self.live: set[ServerRequest] = set()  # requests that have not ended
        self.draining = False
        self.metrics: Metrics  # set by ServerState
        self.loader = concurrent.futures.ThreadPoolExecutor(1, "loader")
        self.encoder = concurrent.futures.ThreadPoolExecutor(1, "encoder")
        self._written: collections.deque[tuple[float, int]] = collections.deque()
        self._loop: asyncio.AbstractEventLoop  # set by start
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # The following belongs to the thread.
        self._stopping = False
        self._models: list[LoadedModel] = []  # the served model and all others that have work
        self._served: LoadedModel | None = None
        self._failures = 0

    def start(self) -> None:
        """Start the thread; call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End all requests and join the threads."""
        self.abort(shutting_down())
        self._commands.put(lambda: setattr(self, "_stopping", True))
        await asyncio.to_thread(self._thread.join, 30)
        self.loader.shutdown(wait=False, cancel_futures=True)
        self.encoder.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Sequences that have not begun."""
        return sum(request.waiting for request in self.live)

    @property
    def running(self) -> int:
        """Sequences that have begun and not ended."""
        return sum(request.running for request in self.live)

    def tokens_per_second(self) -> float:
        """Tokens written per second over the last ten seconds."""
        now = time.monotonic()
        while self._written and self._written[0][0] < now - RATE_SECONDS:
            self._written.popleft()
        return sum(count for _, count in self._written) / RATE_SECONDS

    async def install(self, model: LoadedModel) -> None:
        """Serve `model` from now on; requests of the model before it finish there."""

        def swap() -> None:
            self._served = model
            self._models.append(model)

        await self._ask(swap)
        self.model = model

    async def submit(self, model: LoadedModel, prompts: list[list[int]], params: SamplingParams) -> ServerRequest:
        """Queue prompts for `model`, served or not; returns when its engine has accepted all of them.

        Raises:
            ApiError: the queue is full, or nothing can be served now.
            BadInput: the engine refused a prompt; then none of them runs.
        """
        if self.draining:
            raise shutting_down(headers={"Retry-After": "5"})
        if self.problem is not None:
            raise not_ready(self.problem)
        request = ServerRequest(prompts, params, model)
        if self.waiting + request.waiting > self.max_queue:
            raise busy(f"{self.waiting} sequences are waiting already, at most {self.max_queue} may; try again soon")
        self.live.add(request)
        try:
            await self._ask(lambda: self._add(request))
        except BaseException:
            self.cancel(request)
            raise
        return request

    def cancel(self, request: ServerRequest) -> None:
        """Free the memory of a request before the next step. Does nothing for one that has ended."""
        self.live.discard(request)
        request.finished = True
        self._commands.put(lambda: self._remove(request))

    def abort(self, error: BaseException) -> None:
        """End all waiting and running requests with `error`."""
        for request in list(self.live):
            request.fail(error)
            self.cancel(request)

    async def _ask(self, command: Callable[[], T]) -> T:
        """Run `command` in the thread between two steps; returns or raises what it did."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(command())
                except Exception as error:
                    answer.set_exception(error)

        self._commands.put(run)
        return await asyncio.wrap_future(answer)

    # The following runs in the thread.

    def _run(self) -> None:
        while not self._stopping:
            with contextlib.suppress(queue.Empty):
                self._commands.get(block=not any(model.engine.busy for model in self._models))()
                while True:
                    self._commands.get_nowait()()
            for model in list(self._models):
                if model.engine.busy:
                    self._step(model)
                elif model is not self._served:
                    self._models.remove(model)

    def _post(self, call: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop has closed
            self._stopping = True

    def _add(self, request: ServerRequest) -> None:
        model = request.model
        if request.finished:  # cancelled before it began
            return
        if model not in self._models:
            self._models.append(model)
        added: list[Request] = []
        try:
            for prompt in request.prompts:
                added.append(model.engine.add(prompt, request.params))  # noqa: PERF401 (undone below)
        except BaseException:
            for one in added:
                model.engine.cancel(one)
            raise
        request.requests = added
        model.owners.update({one.id: (request, prompt) for prompt, one in enumerate(added)})

    def _remove(self, request: ServerRequest) -> None:
        for one in request.requests:
            request.model.engine.cancel(one)
            request.model.owners.pop(one.id, None)

    def _step(self, model: LoadedModel) -> None:
        began = time.monotonic()
        try:
            steps = model.engine.step()
        except Exception as error:  # the server lives on, and its clients get the error
            self._step_failed(model, error)
            return
        self._failures = 0
        sequences = len({(step.request, step.index) for step in steps})
        news: dict[ServerRequest, list[tuple[int, StepOutput]]] = collections.defaultdict(list)
        for step in steps:
            if step.request in model.owners:
                owner, prompt = model.owners[step.request]
                news[owner].append((prompt, step))
        self._post(self._deliver, list(news.items()), sequences, time.monotonic() - began)

    def _step_failed(self, model: LoadedModel, error: Exception) -> None:
        logger.error("a step failed: %s", error, exc_info=not isinstance(error, SmolforgeError))
        self._failures += 1
        owned = {owner for owner, _ in model.owners.values()}
        for request in owned:
            self._remove(request)
        self._post(self._fail, owned, error, self._failures >= MAX_FAILURES and model is self._served)

    # The following runs on the event loop again.

    def _deliver(self, news: Sequence[tuple[ServerRequest, Any]], sequences: int, seconds: float) -> None:
        written = 0
        for request, steps in news:
            if request.finished:
                continue
            first = request.first_token is None
            request.deliver(steps)
            written += sum(step.token_id is not None and not step.prompt for _, step in steps)
            if first and request.first_token is not None:
                self.metrics.first_token.observe(request.first_token)
            if request.finished:
                self.cancel(request)
        self._written.append((time.monotonic(), written))
        self.metrics.observe_step(sequences, written, seconds)

    def _fail(self, requests: set[ServerRequest], error: Exception, broken: bool) -> None:
        for request in requests:
            self.live.discard(request)
            request.fail(ApiError(500, f"the model failed: {error}", code="model_failed"))
        if broken:
            self.problem = f"the model failed {MAX_FAILURES} times in a row: {error}"
