"""What Prometheus reads at /metrics. One registry for each server, so that two in one process do not mix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from smolforge.serving.engine_thread import EngineThread

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters. Everything is counted on the event loop."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "smolforge_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "smolforge_request_seconds", "From the request to its last byte.", ["route"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "smolforge_time_to_first_token_seconds", "From arrival to the first token written.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            "smolforge_step_seconds", "Time of one step of the engine.", buckets=_SECONDS, registry=registry
        )
        self.step_rows = Histogram(
            "smolforge_batch_size", "Sequences that wrote in one step.", buckets=_ROWS, registry=registry
        )
        self.prompt_tokens = Counter("smolforge_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        self.written_tokens = Counter("smolforge_completion_tokens", "Tokens written.", registry=registry)
        self.swaps = Counter(
            "smolforge_checkpoint_swaps", "Newer checkpoints that took over while serving.", registry=registry
        )

    def watch(self, worker: EngineThread) -> None:
        """Read the worker's state whenever the metrics are read."""

        def gauge(name: str, text: str, read) -> None:
            Gauge(name, text, registry=self.registry).set_function(read)

        gauge("smolforge_queue_length", "Sequences that wait.", lambda: worker.waiting)
        gauge("smolforge_running", "Sequences that are being written.", lambda: worker.running)
        gauge("smolforge_tokens_per_second", "Tokens written, over ten seconds.", worker.tokens_per_second)
        gauge("smolforge_up", "1 when requests are served.", lambda: int(bool(worker.model) and not worker.problem))
        gauge("smolforge_checkpoint_step", "Training step served.", lambda: (worker.model and worker.model.step) or 0)
        cache = Gauge("smolforge_cache_bytes", "Memory of keys and values.", ["kind"], registry=self.registry)
        for kind in ("reserved", "kept", "budget"):
            cache.labels(kind).set_function(lambda kind=kind: _cache_bytes(worker, kind))

        worker.observe_first = self.first_token.observe

        def observe_step(rows: int, tokens: int, seconds: float) -> None:
            self.step_seconds.observe(seconds)
            self.written_tokens.inc(tokens)
            if rows:
                self.step_rows.observe(rows)

        worker.observe_step = observe_step

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)


def _cache_bytes(worker: EngineThread, kind: str) -> int:
    return worker.model.engine.memory()[f"cache_{kind}"] if worker.model else 0
