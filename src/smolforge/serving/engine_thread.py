"""The thread that owns the engines. The event loop hands it work and gets steps back; neither waits for the other.

Several engines may live at once: the served one, an older one that still finishes what it began before a newer
checkpoint took its place, and those of a time-lapse. Each turn of the loop takes commands, then steps every
engine that is busy. Reading weights happens in a second thread, so that streams go on meanwhile.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from smolforge.errors import SmolforgeError
from smolforge.serving.errors import ApiError, busy
from smolforge.serving.models import LoadedModel
from smolforge.serving.server_request import ServerRequest

if TYPE_CHECKING:
    from smolforge.generation.sampling_params import SamplingParams
    from smolforge.generation.sequence import StepOutput

log = logging.getLogger("smolforge.serving")
T = TypeVar("T")
FAILURES = 3  # steps in a row that fail before the server calls itself broken
RATE_SECONDS = 10.0


class EngineThread:
    """Runs generations. Everything but `_run` and what it calls belongs to the event loop.

    Args:
        max_queue: most sequences that wait.

    Attributes:
        model: what is served now; None while it loads.
        problem: why nothing can be served, or None.
        live: generations that have not ended.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.model: LoadedModel | None = None
        self.problem: str | None = None
        self.live: set[ServerRequest] = set()
        self.draining = False
        self.batch_size = 0
        self.observe_step: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None
        self.observe_first: Callable[[float], None] = lambda seconds: None
        self._written: collections.deque[tuple[float, int]] = collections.deque()
        self._loop: asyncio.AbstractEventLoop  # set by start
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._owners: dict[tuple[int, int], ServerRequest] = {}  # (id of the model, id of its request)
        self._models: list[LoadedModel] = []  # of the thread: all that have work, and the served one
        self._served: LoadedModel | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.loader = concurrent.futures.ThreadPoolExecutor(1, "loader")
        self.encoder = concurrent.futures.ThreadPoolExecutor(1, "encoder")

    def start(self) -> None:
        """Start the thread; called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End what runs and join the threads."""
        self.abort(ApiError(503, "the server is shutting down", code="shutting_down"))
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, 30)
        self.loader.shutdown(wait=False, cancel_futures=True)
        self.encoder.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Sequences that have not begun."""
        return sum(generation.waiting for generation in self.live)

    @property
    def running(self) -> int:
        """Sequences that have begun and not ended."""
        return sum(generation.running for generation in self.live)

    def tokens_per_second(self) -> float:
        """Tokens written over the last ten seconds."""
        now = time.monotonic()
        while self._written and self._written[0][0] < now - RATE_SECONDS:
            self._written.popleft()
        return sum(count for _, count in self._written) / RATE_SECONDS

    async def install(self, model: LoadedModel) -> None:
        """Serve `model` from now on; what runs on the one before it finishes there."""

        def swap() -> None:
            self._served = model
            self._models.append(model)

        await self._ask(swap)
        self.model = model

    async def submit(
        self, prompts: list[list[int]], sampling: SamplingParams, model: LoadedModel | None = None
    ) -> ServerRequest:
        """Queue prompts; back as soon as the engine has taken all of them.

        Raises:
            ApiError: the queue is full, or nothing can be served now.
            BadInput: the engine refused a prompt; none of them runs.
        """
        target = model or self.model
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if self.problem is not None or target is None:
            reason = self.problem or "the model is loading"
            raise ApiError(503, reason, code="not_ready", headers={"Retry-After": "2"})
        generation = ServerRequest(prompts, sampling, target)
        if self.waiting + generation.sequences > self.max_queue:
            raise busy(f"{self.waiting} sequences are waiting already, at most {self.max_queue} may; try again soon")
        self.live.add(generation)
        try:
            await self._ask(lambda: self._add(generation))
        except BaseException:
            self.cancel(generation)
            raise
        return generation

    def cancel(self, generation: ServerRequest) -> None:
        """Free what a generation holds before the next step. Does nothing for one that has ended."""
        self.live.discard(generation)
        if not generation.finished:
            generation.finished = True
        self._tell(lambda: self._remove(generation))

    def abort(self, error: BaseException) -> None:
        """End everything that waits or runs with `error`."""
        for generation in list(self.live):
            generation.fail(error)
            self.cancel(generation)

    def _tell(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    async def _ask(self, command: Callable[[], T]) -> T:
        """Run `command` in the thread between two steps; what it returned or raised."""
        answer: asyncio.Future[T] = self._loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        def run() -> None:
            value, error = None, None
            try:
                value = command()
            except Exception as problem:  # carried over to whoever asked
                error = problem
            self._post(settle, value, error)

        self._tell(run)
        return await answer

    def _post(self, call: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop has closed: nobody is left to be told
            self._stopping = True

    # What follows runs in the thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._stopping or any(m.engine.busy for m in self._models)):
                    self._wake.wait()
                if self._stopping:
                    return
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                command()
            for model in list(self._models):
                if model.engine.busy:
                    self._step(model)
                elif model is not self._served:
                    self._models.remove(model)

    def _add(self, generation: ServerRequest) -> None:
        model = generation.model
        if generation.finished:  # cancelled before it began
            return
        if model not in self._models:
            self._models.append(model)
        requests = []
        try:
            for prompt in generation.prompts:
                requests.append(model.engine.add(prompt, generation.sampling))  # noqa: PERF401 (undone below)
        except BaseException:
            for request in requests:
                model.engine.cancel(request)
            raise
        generation.accept(requests)
        for request in requests:
            self._owners[id(model), request.id] = generation

    def _remove(self, generation: ServerRequest) -> None:
        for request in generation.requests:
            generation.model.engine.cancel(request)
            self._owners.pop((id(generation.model), request.id), None)

    def _step(self, model: LoadedModel) -> None:
        began = time.monotonic()
        try:
            steps = model.engine.step()
        except Exception as error:  # whatever it is, the server lives and its clients are told
            self._broken_step(model, error)
            return
        self._failures = 0
        rows = len({(step.request, step.index) for step in steps})
        news: dict[ServerRequest, list[StepOutput]] = collections.defaultdict(list)
        for step in steps:
            owner = self._owners.get((id(model), step.request))
            if owner is not None:
                news[owner].append(step)
        self._post(self._deliver, list(news.items()), rows, time.monotonic() - began)

    def _broken_step(self, model: LoadedModel, error: Exception) -> None:
        log.error("a step failed: %s", error, exc_info=not isinstance(error, SmolforgeError))
        self._failures += 1
        mine = {owner for (home, _), owner in self._owners.items() if home == id(model)}
        for generation in mine:
            self._remove(generation)
        self._post(self._fail, mine, error, self._failures >= FAILURES and model is self._served)

    # What follows runs on the event loop again.

    def _deliver(self, news: Sequence[tuple[ServerRequest, list[StepOutput]]], rows: int, seconds: float) -> None:
        written = 0
        for generation, steps in news:
            if generation.finished:
                continue
            fresh = generation.first_token is None
            generation.deliver(steps)
            written += sum(step.token_id is not None and not step.prompt for step in steps)
            if fresh and generation.first_token is not None:
                self.observe_first(generation.first_token)
            if generation.finished:
                self.live.discard(generation)
                self._tell(lambda done=generation: self._remove(done))
        self.batch_size = rows
        self._written.append((time.monotonic(), written))
        self.observe_step(rows, written, seconds)

    def _fail(self, generations: set[ServerRequest], error: Exception, broken: bool) -> None:
        told = ApiError(500, f"the model failed: {error}", code="model_failed")
        for generation in generations:
            self.live.discard(generation)
            generation.fail(told)
        if broken:
            self.problem = f"the model failed {FAILURES} times in a row: {error}"
