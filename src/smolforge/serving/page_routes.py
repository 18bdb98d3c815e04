"""The page at /, and what its script asks for: text with probabilities, the time-lapse, a run's curves.

The page (`page/`) is plain HTML, JavaScript modules and styles: it needs no build step and loads nothing from other
servers. Its Chat tab asks /v1/chat/completions and keeps conversations in the browser. Markdown is read by marked and
cleaned by DOMPurify (`page/static/vendor`), charts are drawn by uPlot (`smolforge/report/static`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import HTMLResponse, Response

from smolforge.config import THREE_PROMPTS
from smolforge.errors import SmolforgeError
from smolforge.generation import CHAT_SAMPLING
from smolforge.generation.sampling_params import Count, Mass, SamplingParams, Share
from smolforge.report.charts import Columns, thin
from smolforge.report.history import read_history, total_steps
from smolforge.run import Run
from smolforge.serving.engine_thread import ServerRequest
from smolforge.serving.errors import as_api_error, refused
from smolforge.serving.openai_routes import prompt_ids, token_string
from smolforge.serving.schemas import API_SAMPLING, StrictModel, Text
from smolforge.serving.state import ModelSource, ServerState
from smolforge.serving.streaming import EventStream, cancel_on_exit, event

if TYPE_CHECKING:
    from smolforge.generation import Engine

ALTERNATIVES = 5
MAX_TOKENS = 1024
SHOWN = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # settings with a control
MAX_CHECKPOINTS = 8  # of one time-lapse
MAX_COMPARED = 8  # runs in one chart
CURVES = ("loss", "lr", "tokens_per_second", "grad_norm")
BUCKETS = 150  # of the steps of a curve; each keeps its extremes
MAX_SAMPLES = 60
READ_PAUSE = 20  # times as long as reading the files of a run took
LIVE_SECONDS = 60.0  # a log written to this recently belongs to a running training


class PageSettings(StrictModel):
    """A prompt, and the sampling settings that the visitor changed; the others are the model's own."""

    prompt: Text = ""
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: Mass | None = None
    top_k: Count | None = None
    min_p: Share | None = None
    repetition_penalty: float | None = None
    seed: int | None = Field(default=None, ge=0, le=2**53 - 1)

    def sampling(self, engine: Engine, logprobs: int | None = None) -> SamplingParams:
        """The parameters for `engine`."""
        given = self.model_dump(exclude={"prompt", "ids", "steps"}, exclude_none=True)
        return engine.params(**given, logprobs=logprobs)


class WriteRequest(PageSettings):
    """A prompt, and the tokens after it that are kept: all of them to continue, some and another one to branch.

    `ignore_eos`: write on past the end of a text, as in the API.
    """

    ids: list[int] = Field(default_factory=list, max_length=1 << 17)
    ignore_eos: bool = False


class ServeRequest(StrictModel):
    """The run of the served directory that is wanted."""

    run: str


class TimelapseRequest(PageSettings):
    """A prompt, and the steps to show; a selection over the run unless given."""

    steps: list[int] = Field(default_factory=list, max_length=MAX_CHECKPOINTS)


def router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter(include_in_schema=False)
    index = (resources.files("smolforge.serving") / "page" / "index.html").read_text(encoding="utf-8")
    views: dict[Path, TrainingView] = {}
    one_timelapse, one_reader = asyncio.Lock(), asyncio.Lock()

    @routes.get("/")
    async def page() -> Response:
        return HTMLResponse(index)

    @routes.get("/page/state")
    async def page_state() -> dict[str, Any]:
        return describe(state)

    @routes.post("/page/write")
    async def write(body: WriteRequest, request: Request) -> Response:
        model = state.model
        [ids] = await prompt_ids(state, model, body.prompt or None)
        with contextlib.ExitStack() as stack:
            stack.enter_context(state.client(request))
            submitted = await state.submit(model, [ids + body.ids], body.sampling(model.engine, ALTERNATIVES))
            stack.enter_context(cancel_on_exit(state.thread, submitted, state.settings.request_seconds))
            return EventStream(write_events(submitted, body.ids), stack.pop_all())

    @routes.post("/page/timelapse")
    async def timelapse(body: TimelapseRequest, request: Request) -> Response:
        known = state.source.timelapse_steps()
        if not known:
            raise refused("steps", "this model does not belong to a run with checkpoints")
        unknown = [step for step in body.steps if step not in known]
        if unknown:
            raise refused("steps", f"there is no checkpoint of step {unknown[0]}")
        steps = sorted(set(body.steps)) or select_steps(known, MAX_CHECKPOINTS - 2)
        with contextlib.ExitStack() as stack:
            stack.enter_context(state.client(request))
            return EventStream(timelapse_events(state, body, steps, one_timelapse), stack.pop_all())

    async def read(run: Run) -> dict[str, Any]:
        async with one_reader:
            return await asyncio.to_thread(views.setdefault(run.path, TrainingView(run)).read)

    @routes.get("/page/run")
    async def run() -> dict[str, Any]:
        return await read(state.source.run) if state.source.run else {"run": None}

    @routes.get("/page/runs")
    async def runs(name: Annotated[list[str], Query(max_length=MAX_COMPARED)]) -> dict[str, Any]:
        known = state.runs()
        return {"runs": [await read(known[one]) for one in name if one in known]}

    @routes.post("/page/serve")
    async def serve(body: ServeRequest) -> dict[str, Any]:
        wanted = state.runs().get(body.run)
        if wanted is None:
            raise refused("run", f"there is no run {body.run[:200]!r} in {state.settings.model}")
        await state.load(ModelSource(str(wanted.path), state.settings.name), switch=True)
        return describe(state)

    return routes


def describe(state: ServerState) -> dict[str, Any]:
    """What the page shows of the server."""
    thread, source, model = state.thread, state.source, state.thread.model
    return {
        "model": source.name,
        "ready": model is not None and thread.problem is None,
        "problem": state.problem,
        "context": model.engine.context if model else None,
        "step": model.step if model else None,
        "steps": source.timelapse_steps(),
        "follows": source.follows,
        "run": source.run.path.name if source.run else None,
        "runs": list(state.runs()),
        "waiting": thread.waiting,
        "key": state.settings.api_key is not None,
        "examples": list(THREE_PROMPTS),
        "write": _shown(PageSettings().sampling(model.engine)) if model else {},  # values of a request that gives none
        "chat": chat_values(model.engine) if model and model.engine.tokenizer.chat_template else None,
    }


def chat_values(engine: Engine) -> dict[str, Any]:
    """What the controls of the Chat tab start at.

    Returns:
        values: of the controls, by name.
        suggested: those that the page sends although the visitor did not change them. A model that says nothing of
            sampling would get the API's temperature of 1, at which a small one talks nonsense.
    """
    own, usual = engine.defaults, {**CHAT_SAMPLING, "top_p": SamplingParams().top_p}
    names = ("max_tokens",) if "temperature" in own else usual
    suggested = {name: usual[name] for name in names if name not in own}
    return {"values": _shown(SamplingParams(**{**API_SAMPLING, **own, **suggested})), "suggested": suggested}


def _shown(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SHOWN}


async def write_events(request: ServerRequest, kept: list[int]) -> AsyncGenerator[bytes, None]:
    """Tokens as they are written, each with its log-probability and the likeliest alternatives."""
    engine = request.model.engine
    start = {"prompt": len(request.prompts[0]) - len(kept), "context": engine.context, "step": request.model.step}
    yield event({"start": start})
    async for batch in request.batches():
        tokens, finish, rest = [], None, ""
        for _, step in batch:
            finish = step.finish_reason or finish
            if step.token_id is not None and step.token_id not in engine.eos_ids:
                top = [[i, token_string(engine.tokenizer, i), round(logprob, 4)] for i, logprob in step.top_logprobs]
                logprob = round(step.logprob or 0.0, 4)
                tokens.append({"id": step.token_id, "text": step.text, "p": logprob, "top": top})
            else:
                rest += step.text
        yield event({"tokens": tokens, **({"finish": finish, "rest": rest} if finish else {})})


def select_steps(steps: list[int], count: int) -> list[int]:
    """At most `count` of `steps`, with both ends, even in the logarithm: models learn most at the beginning."""
    if len(steps) <= count:
        return steps
    low, high = max(1, steps[0]), max(2, steps[-1])
    wanted = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    chosen = {min(steps, key=lambda step, goal=goal: abs(step - goal)) for goal in wanted} | {steps[0], steps[-1]}
    for step in reversed(steps):  # where early checkpoints are few, the latest ones fill up
        if len(chosen) >= count:
            break
        chosen.add(step)
    return sorted(chosen)


async def timelapse_events(
    state: ServerState, body: TimelapseRequest, steps: list[int], one_at_a_time: asyncio.Lock
) -> AsyncGenerator[bytes, None]:
    """The same prompt and seed through checkpoints of the run, oldest first; memory holds two models at a time."""
    yield event({"steps": steps})
    loop, thread, settings, source = asyncio.get_running_loop(), state.thread, state.settings, state.source
    async with one_at_a_time:
        for step in steps:
            yield event({"step": step, "state": "loading"})
            try:
                model = await loop.run_in_executor(thread.loader, source.open, settings, step)
                tokenizer = model.engine.tokenizer
                ids = tokenizer.encode_prompt(body.prompt) or [tokenizer.eos_id]
                submitted = await state.submit(model, [ids], body.sampling(model.engine))
            except SmolforgeError as error:  # a checkpoint that was deleted or damaged meanwhile
                yield event({"step": step, "state": "failed", "message": as_api_error(error).message})
                continue
            with cancel_on_exit(thread, submitted, settings.request_seconds):
                async for batch in submitted.batches():
                    yield event({"step": step, "text": "".join(part.text for _, part in batch)})
            yield event({"step": step, "state": "done"})
    yield event({"end": True})


class TrainingView:
    """The curves and samples of one run, from its files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._shown: dict[str, Any] = {}
        self._next = 0.0

    def read(self) -> dict[str, Any]:
        """Everything that the page shows. A long log is read less often, since a training may run next to this."""
        began = time.monotonic()
        if began >= self._next:
            self._shown = self._read()
            now = time.monotonic()
            self._next = now + READ_PAUSE * (now - began)
        return self._shown

    def _read(self) -> dict[str, Any]:
        history = read_history(self.run)
        training = {name: history.training[name] for name in ("step", "tokens", *CURVES)}
        few = thin(training, x="step", extremes=CURVES, buckets=BUCKETS)
        validation = _points(history.validation, "loss")
        curves = {name: _points(few, name) for name in CURVES} | {"validation": validation}
        last = {name: _points(training, name)[-1:] for name in training} | {"validation": validation[-1:]}
        return {
            "run": history.name,
            "curves": {name: points for name, points in curves.items() if points},
            "last": {name: points[0][1] for name, points in last.items() if points},
            "total": total_steps(history),
            "live": self._live(),
            "samples": history.samples[-MAX_SAMPLES:],
        }

    def _live(self) -> bool:
        try:
            return time.time() - self.run.metrics_path.stat().st_mtime < LIVE_SECONDS
        except OSError:
            return False


def _points(table: Columns, name: str) -> list[list[float]]:
    """The (step, value) pairs of a column, without those whose value is not known."""
    pairs = np.stack((table["step"], table[name]), 1)
    return pairs[np.isfinite(table[name])].tolist()
