"""The page at /, and what its script asks for: text with probabilities, the time-lapse, a run's curves.

The page (`page/`) is plain HTML, JavaScript modules and styles: it needs no build step and loads nothing from other
servers. Its charts are drawn by uPlot, vendored in `smolforge/report/static`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncGenerator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import HTMLResponse, Response

from smolforge.config import THREE_PROMPTS, RunConfig
from smolforge.errors import SmolforgeError
from smolforge.generation.sampling_params import SamplingParams
from smolforge.run import Run
from smolforge.serving.engine_thread import ServerRequest
from smolforge.serving.errors import as_api_error, refused
from smolforge.serving.openai_routes import prompt_ids, token_string
from smolforge.serving.schemas import StrictModel, Text
from smolforge.serving.state import ServerState
from smolforge.serving.streaming import EventStream, cancel_on_exit, event

ALTERNATIVES = 5
MAX_TOKENS = 1024
MAX_CHECKPOINTS = 8  # of one time-lapse
CURVES = ("loss", "lr", "tokens_per_second", "grad_norm")
MAX_POINTS = 1500
MAX_SAMPLES = 60
LIVE_SECONDS = 60.0  # a log written to this recently belongs to a running training


class PageSettings(StrictModel):
    """The sampling settings of the page."""

    prompt: Text = ""
    max_tokens: int = Field(default=100, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=0.8, ge=0, le=2)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = 1.0
    seed: int | None = Field(default=None, ge=0, le=2**53 - 1)

    def sampling(self, logprobs: int | None) -> SamplingParams:
        """The parameters for the engine."""
        return SamplingParams(**self.model_dump(exclude={"prompt", "ids", "steps"}), logprobs=logprobs)


class WriteRequest(PageSettings):
    """A prompt, and the tokens after it that are kept: all of them to continue, some and another one to branch."""

    ids: list[int] = Field(default_factory=list, max_length=1 << 17)


class TimelapseRequest(PageSettings):
    """A prompt, and the steps to show; a selection over the run unless given."""

    steps: list[int] = Field(default_factory=list, max_length=MAX_CHECKPOINTS)


def router(state: ServerState) -> APIRouter:
    """The routes."""
    routes = APIRouter(include_in_schema=False)
    index = (resources.files("smolforge.serving") / "page" / "index.html").read_text(encoding="utf-8")
    view = TrainingView(state.source.run) if state.source.run else None
    one_timelapse, one_reader = asyncio.Lock(), asyncio.Lock()

    @routes.get("/")
    async def page() -> Response:
        return HTMLResponse(index)

    @routes.get("/page/state")
    async def page_state() -> dict[str, Any]:
        return describe(state)

    @routes.post("/page/write")
    async def write(body: WriteRequest, request: Request) -> Response:
        [ids] = await prompt_ids(state, body.prompt or None)
        with contextlib.ExitStack() as stack:
            stack.enter_context(state.client(request))
            submitted = await state.submit([ids + body.ids], body.sampling(ALTERNATIVES))
            stack.enter_context(cancel_on_exit(state.thread, submitted, state.settings.request_seconds))
            return EventStream(write_events(submitted, body.ids), stack.pop_all())

    @routes.post("/page/timelapse")
    async def timelapse(body: TimelapseRequest, request: Request) -> Response:
        known = state.source.steps()
        if not known:
            raise refused("steps", "this model does not belong to a run with checkpoints")
        unknown = [step for step in body.steps if step not in known]
        if unknown:
            raise refused("steps", f"there is no checkpoint of step {unknown[0]}")
        steps = sorted(set(body.steps)) or select_steps(known, MAX_CHECKPOINTS - 2)
        with contextlib.ExitStack() as stack:
            stack.enter_context(state.client(request))
            return EventStream(timelapse_events(state, body, steps, one_timelapse), stack.pop_all())

    @routes.get("/page/run")
    async def run() -> dict[str, Any]:
        if view is None:
            return {"run": None}
        async with one_reader:
            return await asyncio.to_thread(view.read)

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
        "steps": source.steps(),
        "follows": source.follows,
        "run": source.run.path.name if source.run else None,
        "waiting": thread.waiting,
        "key": state.settings.api_key is not None,
        "examples": list(THREE_PROMPTS),
    }


async def write_events(request: ServerRequest, kept: list[int]) -> AsyncGenerator[bytes, None]:
    """Tokens as they are written, each with its log-probability and the likeliest alternatives."""
    engine = request.model.engine
    yield event(
        {
            "start": {
                "prompt": len(request.prompts[0]) - len(kept),
                "context": engine.context,
                "step": request.model.step,
            }
        }
    )
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
    loop, thread, settings = asyncio.get_running_loop(), state.thread, state.settings
    async with one_at_a_time:
        for step in steps:
            yield event({"step": step, "state": "loading"})
            try:
                model = await loop.run_in_executor(thread.loader, state.source.open, settings, step)
                tokenizer = model.engine.tokenizer
                ids = tokenizer.encode(body.prompt) if body.prompt else [tokenizer.eos_id]
                submitted = await state.submit([ids], body.sampling(None), model)
            except SmolforgeError as error:  # a checkpoint that was deleted or damaged meanwhile
                yield event({"step": step, "state": "failed", "message": as_api_error(error).message})
                continue
            with cancel_on_exit(thread, submitted, settings.request_seconds):
                async for batch in submitted.batches():
                    yield event({"step": step, "text": "".join(part.text for _, part in batch)})
            yield event({"step": step, "state": "done"})
    yield event({"end": True})


class Curve:
    """(step, value) pairs of a growing log; every other pair goes when there are more than `MAX_POINTS`."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self._stride, self._seen = 1, 0

    def add(self, step: int, value: float) -> None:
        """Take the next pair."""
        if self._seen % self._stride == 0:
            self.points.append((step, value))
            if len(self.points) > MAX_POINTS:
                self.points = self.points[::2]
                self._stride *= 2
        self._seen += 1


class Tail:
    """The whole rows that a growing file of JSON lines gained; one that was replaced or cut is read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether the rows begin again at the first one, the rows)."""
        try:
            file = self.path.open("rb")
        except OSError:
            return False, []
        with file:
            status = os.fstat(file.fileno())
            identity = status.st_dev, status.st_ino
            restarted = identity != self._identity or status.st_size < self._offset
            if restarted:
                self._identity, self._offset = identity, 0
            file.seek(self._offset)
            data = file.read(64 << 20)
        end = data.rfind(b"\n") + 1
        self._offset += end
        rows = []
        for line in data[:end].splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return restarted, rows


class TrainingView:
    """The curves and samples of one run, from its files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._metrics, self._samples = Tail(run.metrics_path), Tail(run.samples_path)
        self._rows: list[dict[str, Any]] = []  # of samples
        self._clear()

    def _clear(self) -> None:
        self.curves = {name: Curve() for name in (*CURVES, "validation")}
        self.last: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """Read what is new; everything that the page shows."""
        restarted, rows = self._metrics.read()
        if restarted:
            self._clear()
        for row in rows:
            self._take(row)
        restarted, rows = self._samples.read()
        self._rows = [*([] if restarted else self._rows), *rows][-MAX_SAMPLES:]
        return {
            "run": self.run.path.name,
            "curves": {name: curve.points for name, curve in self.curves.items() if curve.points},
            "last": self.last,
            "total": self._total(),
            "live": self._live(),
            "samples": [
                {"step": row["step"], "prompt": str(row.get("prompt", "")), "text": str(row.get("text", ""))}
                for row in self._rows
            ],
        }

    def _take(self, row: dict[str, Any]) -> None:
        step, validation = row["step"], row.get("validation")
        if isinstance(validation, dict):
            if isinstance(validation.get("loss"), (int, float)):
                self.curves["validation"].add(step, validation["loss"])
                self.last["validation"] = validation["loss"]
        elif "event" not in row:
            numbers = {name: row[name] for name in (*CURVES, "tokens") if isinstance(row.get(name), (int, float))}
            for name in CURVES:
                if name in numbers:
                    self.curves[name].add(step, numbers[name])
            self.last.update(numbers, step=step)

    def _live(self) -> bool:
        try:
            return time.time() - self.run.metrics_path.stat().st_mtime < LIVE_SECONDS
        except OSError:
            return False

    def _total(self) -> int | None:
        try:
            config = yaml.safe_load(self.run.config_path.read_text(encoding="utf-8"))
            return RunConfig.model_validate(config).total_steps if config.get("training") else None
        except (OSError, ValueError, yaml.YAMLError, AttributeError):
            return None
