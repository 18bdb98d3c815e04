"""What all routes share: settings, the engine thread, the source of models, metrics, and limits of each client."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from smolforge import hub
from smolforge.checkpoint import commit, locate
from smolforge.checkpoint.weights import weight_files
from smolforge.errors import CheckpointError, SmolforgeError
from smolforge.gguf_file import is_gguf
from smolforge.run import Run
from smolforge.serving.engine_thread import EngineThread, LoadedModel, ServerRequest
from smolforge.serving.errors import ApiError, busy, not_ready, refused
from smolforge.serving.security import Keys
from smolforge.serving.settings import ServeSettings

if TYPE_CHECKING:
    from starlette.requests import Request

    from smolforge.generation.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)


class ModelSource:
    """What the user named, and the models that can be loaded from it.

    Attributes:
        name: id of the model in the API.
        run: the run that the model belongs to, or None; it feeds the time-lapse and the training tab.
        follows: whether newer checkpoints replace the served one: for a run, not for one of its checkpoints.
    """

    def __init__(self, model: str, name: str | None = None) -> None:
        self.model = model
        path = Path(model).expanduser()
        self.run: Run | None = None
        self.follows = False
        if not path.exists():
            if not hub.is_model_id(model):
                locate.resolve_model(model)  # fetches hf://.../FILE.gguf, else raises the error that explains it
            self.name = name or (Path(model).stem if hub.GGUF_ADDRESS.match(model) else model)
            return
        path = path.resolve()
        self.run, whole = locate.run_of(path), Run(path)
        is_run = not (path / "config.json").is_file() and (whole.exists or whole.checkpoints_path.is_dir())
        if self.run is None and is_run:
            self.run, self.follows = whole, True
        self.name = name or (path.stem if is_gguf(path) else path.name)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first; empty for a model outside a run."""
        return commit.steps(self.run.checkpoints_path) if self.run else []

    def newest(self) -> tuple[float, int] | None:
        """The `LoadedModel.age` of the newest checkpoint, of time 0 where its weights cannot be read."""
        if not (self.run and (steps := self.steps())):
            return None
        try:
            files = weight_files(self.run.checkpoints_path / commit.step_name(steps[-1]))
            return files[0].stat().st_mtime, steps[-1]
        except (OSError, SmolforgeError):
            return 0.0, steps[-1]

    def timelapse_steps(self) -> list[int]:
        """Steps with a checkpoint or a frame, oldest first; empty for a model outside a run."""
        return sorted({*self.steps(), *commit.steps(self.run.frames_path)}) if self.run else []

    def open(self, settings: ServeSettings, step: int | None = None) -> LoadedModel:
        """Load the checkpoint or frame of `step`, or the newest whole one with the draft model of the settings.

        Raises:
            CheckpointError: there is no usable checkpoint.
            BadInput: the draft has other token ids; its `field` is "draft".
        """
        from smolforge.generation.engine import Engine

        model: str | Path = self.model
        if step is not None:
            if self.run is None or step not in self.timelapse_steps():
                raise CheckpointError(f"there is no checkpoint of step {step}", field="steps")
            folder = self.run.checkpoints_path if step in self.steps() else self.run.frames_path
            model = folder / commit.step_name(step)
        draft = settings.draft if step is None else None
        engine = Engine.from_pretrained(
            model, quantize=settings.quantize, max_batch=settings.max_batch, draft=draft,
            adapter=settings.adapter if step is None else None,
        )  # fmt: skip
        assert engine.directory is not None
        created = weight_files(engine.directory)[0].stat().st_mtime
        return LoadedModel(self.name, engine, commit.step_of(engine.directory.resolve()), created)


def runs_below(model: str) -> dict[str, Run]:
    """The runs right below a directory, by name; none where the name is that of a run or a model itself."""
    place = Path(model).expanduser()
    if not place.is_dir() or (place / "config.json").is_file() or Run(place).checkpoints_path.is_dir():
        return {}
    return {entry.name: Run(entry) for entry in sorted(place.iterdir()) if Run(entry).exists}


def _changed(run: Run) -> float:
    """When a run was last written to."""
    return max(path.stat().st_mtime for path in (run.config_path, run.metrics_path) if path.exists())


class Metrics:
    """The metrics of one server for Prometheus. All are updated on the event loop.

    The registry belongs to the server, so that two servers in one process stay apart.
    """

    def __init__(self, thread: EngineThread) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"smolforge_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"smolforge_{name}", text, labels, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, read: Callable[[], float]) -> None:
            Gauge(f"smolforge_{name}", text, registry=registry).set_function(read)

        self.requests = counter("requests", "Requests by route and status.", "route", "status")
        self.request_seconds = histogram("request_seconds", "From the request to its last byte.", "route")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token written.")
        self._step_seconds = histogram("step_seconds", "Time of one step of the engine.")
        self._batch_size = histogram("batch_size", "Sequences that wrote in one step.", buckets=_SEQUENCES)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of accepted prompts.")
        self._written_tokens = counter("completion_tokens", "Tokens written.")
        self.swaps = counter("checkpoint_swaps", "Newer checkpoints that were taken over while serving.")
        gauge("queue_length", "Sequences that wait.", lambda: thread.waiting)
        gauge("running", "Sequences that are being written.", lambda: thread.running)
        gauge("tokens_per_second", "Tokens written, over ten seconds.", thread.tokens_per_second)
        gauge("up", "1 when requests are served.", lambda: int(bool(thread.model) and not thread.problem))
        gauge("checkpoint_step", "Training step served.", lambda: (thread.model and thread.model.step) or 0)
        cache = Gauge("smolforge_cache_bytes", "Memory of keys and values.", ["kind"], registry=registry)
        for kind in ("reserved", "kept", "budget"):
            cache.labels(kind).set_function(
                lambda kind=kind: thread.model.engine.memory()[f"cache_{kind}"] if thread.model else 0
            )

    def observe_step(self, sequences: int, tokens: int, seconds: float) -> None:
        """Count a step of the engine."""
        self._step_seconds.observe(seconds)
        self._written_tokens.inc(tokens)
        if sequences:
            self._batch_size.observe(sequences)


class ServerState:
    """The state of one server, on the event loop.

    Attributes:
        source: of the served model. Of a directory of runs it is the run that was written to last, until a visitor of
            the page chooses another.
        failure: why the model could not be loaded at all; `server.serve` ends with it.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.keys = Keys(*settings.keys)
        newest = max(self.runs().values(), key=_changed, default=None)
        self.source = ModelSource(str(newest.path) if newest else settings.model, settings.name)
        self.thread = EngineThread(settings.max_queue)
        self.metrics = self.thread.metrics = Metrics(self.thread)
        self.failure: Exception | None = None
        self._clients: collections.Counter[str] = collections.Counter()

    def runs(self) -> dict[str, Run]:
        """The runs of the served directory, by name; none where one run or one model is served."""
        return runs_below(self.settings.model)

    async def load(self, source: ModelSource, *, switch: bool = False) -> None:
        """Serve the newest model of a source; without `switch` only where it is newer than the served one.

        Raises:
            SmolforgeError: it cannot be loaded; the model before it is served on.
        """
        model = await asyncio.get_running_loop().run_in_executor(self.thread.loader, source.open, self.settings)
        before = self.thread.model
        if not switch and (source is not self.source or (before and model.age <= before.age)):
            return  # another run is served by now; or the newer checkpoint is damaged, and this is an older one
        await self.thread.install(model)
        self.thread.problem, self.source = None, source
        logger.info("serving %s from %s", source.name, model.engine.directory)
        for decision in model.engine.decisions:
            logger.info("%s", decision)
        if before is not None:
            self.metrics.swaps.inc()

    @property
    def problem(self) -> str | None:
        """Why requests are not served now, or None."""
        if self.thread.draining:
            return "the server is shutting down"
        if self.thread.problem is not None or self.thread.model is not None:
            return self.thread.problem
        waiting = self.source.follows and not self.source.steps()
        return "the run has no checkpoint yet" if waiting else "the model is loading"

    @property
    def model(self) -> LoadedModel:
        """The served model; ApiError 503 while there is none."""
        model = self.thread.model
        if model is None or self.thread.problem is not None:
            raise not_ready(self.problem or "the model is loading")
        return model

    def model_named(self, name: str | None) -> LoadedModel:
        """The served model, by its id or None, for the whole of a request; ApiError 404 for others, 503 for none."""
        served = self.thread.model.name if self.thread.model else self.source.name
        if name is not None and name != served:
            text = f"the model {name[:200]!r} does not exist here; this server has {served!r}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return self.model

    async def compute(self, work: Callable[[], T]) -> T:
        """Run work of the tokenizer off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.thread.encoder, work)

    @contextlib.contextmanager
    def client(self, request: Request) -> Iterator[None]:
        """Count an unfinished request of its client until the block ends; ApiError 429 where it has too many."""
        # One key for all says nothing about who it is.
        key = self.keys.of(request) if len(self.settings.keys) > 1 else None
        who = f"key {key}" if key is not None else request.client.host if request.client else "local"
        limit = self.settings.max_per_client
        if self._clients[who] >= limit:
            raise busy(f"this client has {self._clients[who]} unfinished requests already, at most {limit} are allowed")
        self._clients[who] += 1
        try:
            yield
        finally:
            self._clients[who] -= 1
            if not self._clients[who]:
                del self._clients[who]

    async def submit(self, model: LoadedModel, prompts: list[list[int]], params: SamplingParams) -> ServerRequest:
        """As `EngineThread.submit`, with a limit on the number of sequences; counts the prompts' tokens."""
        count, limit = len(prompts) * params.n, self.settings.max_sequences
        if count > limit:
            text = f"{len(prompts)} prompts with n = {params.n} are {count} sequences, at most {limit} are allowed"
            raise refused("prompt", text)
        request = await self.thread.submit(model, prompts, params)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return request
