"""What every route shares: the settings, the worker, the model's source, and who is asking for how much."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from starlette.requests import Request

from smolforge.serving.errors import ApiError, busy, refused
from smolforge.serving.server_request import ServerRequest
from smolforge.serving.settings import ServeSettings

if TYPE_CHECKING:
    from smolforge.generation.sampling_params import SamplingParams
    from smolforge.serving.engine_thread import EngineThread
    from smolforge.serving.metrics import Metrics
    from smolforge.serving.models import LoadedModel, ModelSource
    from smolforge.tokenizer import Tokenizer


class Service:
    """One server's state. Lives on the event loop.

    Attributes:
        stopping: set when the server begins to shut down.
        failure: why the model could not be loaded at all; `server.serve` ends with it.
    """

    def __init__(self, settings: ServeSettings, source: ModelSource, worker: EngineThread, metrics: Metrics) -> None:
        self.settings, self.source, self.worker, self.metrics = settings, source, worker, metrics
        self.stopping = asyncio.Event()
        self.failure: Exception | None = None
        self._clients: collections.Counter[str] = collections.Counter()

    @property
    def model(self) -> LoadedModel:
        """The served model.

        Raises:
            ApiError: 503 while there is none.
        """
        if self.worker.model is None or self.worker.problem is not None:
            reason = self.worker.problem or self.loading
            raise ApiError(503, reason, code="not_ready", headers={"Retry-After": "2"})
        return self.worker.model

    @property
    def loading(self) -> str:
        """Why there is no model yet."""
        return "the run has no checkpoint yet" if self.source.waiting else "the model is loading"

    @property
    def tokenizer(self) -> Tokenizer:
        """The served model's."""
        return self.model.engine.tokenizer

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here; no name means the one that is.

        Raises:
            ApiError: 404 with the right name.
        """
        if name is not None and name != self.source.name:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist here; this server has {self.source.name!r}",
                param="model",
                code="model_not_found",
            )

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens being only text. Off the event loop."""
        tokenizer = self.tokenizer
        return await asyncio.get_running_loop().run_in_executor(self.worker.encoder, tokenizer.encode, text)

    async def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts."""
        encode = self.tokenizer.encode

        def work() -> list[list[int]]:
            return [encode(text) for text in texts]

        return await asyncio.get_running_loop().run_in_executor(self.worker.encoder, work)

    def check_sequences(self, prompts: int, n: int) -> None:
        """Refuse a request of too many sequences.

        Raises:
            ApiError: 400.
        """
        most = self.settings.max_sequences
        if prompts * n > most:
            raise refused("prompt", f"{prompts} prompts with n = {n} are {prompts * n} sequences, at most {most}")

    @contextlib.contextmanager
    def client(self, request: Request) -> Iterator[None]:
        """Count a request of a client until the block ends.

        Raises:
            ApiError: 429 where the client has too many unfinished ones.
        """
        who = request.client.host if request.client else "local"
        most = self.settings.max_per_client
        if self._clients[who] >= most:
            raise busy(f"this client has {self._clients[who]} unfinished requests already, at most {most} are allowed")
        self._clients[who] += 1
        try:
            yield
        finally:
            self._clients[who] -= 1
            if not self._clients[who]:
                del self._clients[who]

    async def submit(
        self, prompts: list[list[int]], sampling: SamplingParams, model: LoadedModel | None = None
    ) -> ServerRequest:
        """As of `EngineThread.submit`, and counted."""
        generation = await self.worker.submit(prompts, sampling, model)
        self.metrics.prompt_tokens.inc(generation.prompt_tokens)
        return generation
