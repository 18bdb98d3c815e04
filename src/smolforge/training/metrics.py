"""What a run says of itself: figures of its steps, validations, samples; to files, trackers and the console.

Logs are the main rank's. Validation runs on all ranks, which share the slice.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolforge.data import Batch, data_digest
from smolforge.evaluation import evaluate
from smolforge.files import read_json_lines
from smolforge.generation.engine import Engine
from smolforge.generation.sampling_params import SamplingParams
from smolforge.metrics_log import MetricsLog
from smolforge.model.summary import flops_per_token
from smolforge.training import plan
from smolforge.training.progress import Console, Throughput
from smolforge.training.setup import TrainContext
from smolforge.training.shutdown import GracefulShutdown
from smolforge.training.trackers import Trackers, open_trackers


@dataclass
class StepMetrics:
    """Of one step, still on the device."""

    batch: Batch
    step: int
    loss: torch.Tensor
    norm: torch.Tensor
    skipped: torch.Tensor
    lr: float


class MetricsLogger:
    """Watches the steps of a session.

    Args:
        session: of the run.
        stop: polled during validation and sampling, which take long.
        console: the live line.
    """

    def __init__(self, session: TrainContext, stop: GracefulShutdown, console: Console) -> None:
        self.session, self.stop, self.console = session, stop, console
        self.config, self.plan, self.ranks = session.config, session.plan, session.ranks
        self.total = self.config.total_steps
        self.flops = flops_per_token(self.config.model, self.config.data.sequence_length)["training"]
        self.peak_flops = plan.known_peak_flops(self.plan.device)
        self.metrics: MetricsLog | None = None
        self.samples: MetricsLog | None = None
        self.trackers: Trackers | None = None

    def open(self, step: int) -> None:
        """Open the logs of a run that stands at `step`; what they hold of later steps is dropped."""
        run, config = self.session.run, self.config
        self.metrics, self.samples = MetricsLog(run.metrics_path), MetricsLog(run.samples_path)
        self.truncate_after(step)
        if 0 < step < self.total:
            self.event(step, "resume", ranks=self.ranks.world)
        self.trackers = open_trackers(
            config.logging.trackers, run, config.model_dump(mode="json"), self.session.say, resume_step=step or None
        )

    def close(self) -> None:
        """Close what is open."""
        for log in (self.metrics, self.samples, self.trackers):
            if log:
                log.close()

    def truncate_after(self, step: int) -> None:
        """Forget what was logged of later steps."""
        for log in (self.metrics, self.samples):
            if log:
                log.truncate_after(step)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Note what happened at a step beside its figures."""
        if self.metrics:
            self.metrics.append({"step": step, "event": event, **details, "time": time.time()})

    def figures(self, figures: StepMetrics, pace: Throughput, data_seconds: float) -> None:
        """Log a step: how it went, how fast, and how long it waited for data since the last one that was logged."""
        digests = [pair for part in self.ranks.gather(figures.batch.digests) for pair in part]
        if not self.ranks.is_main:
            return
        speed = pace.tokens_per_second
        row: dict[str, Any] = {
            "step": figures.step,
            "tokens": figures.step * self.config.tokens_per_step,
            "loss": float(figures.loss) / self.config.tokens_per_step,
            "lr": figures.lr,
            "grad_norm": float(figures.norm),
            "tokens_per_second": round(speed, 1),
            "memory_bytes": memory_in_use(self.plan.device),
            "data_seconds": round(data_seconds, 4),
            "data_digest": data_digest(digests),
            "time": time.time(),
        }
        if self.peak_flops:
            row["mfu"] = round(speed * self.flops / self.peak_flops / self.ranks.world, 4)
        assert self.metrics and self.trackers
        self.metrics.append(row)
        shown = {**row, "loss": row["loss"] if math.isfinite(row["loss"]) else None}
        self.console.figures(shown, self.total, (self.total - figures.step) * pace.seconds_per_step)
        names = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "data_seconds", "mfu")
        self.trackers.scalars(figures.step, {f"train/{k}": row[k] for k in names if row.get(k) is not None})

    def catch_up(self, step: int) -> None:
        """Evaluations that a killed process still owed the step it had saved."""
        validation, samples = self.owed(step)
        if validation:
            self.validate(step)
        if samples:
            if self.samples:
                self.samples.truncate_after(step - 1)
            self.sample(step)

    def owed(self, step: int) -> tuple[bool, bool]:
        """Whether the step the run stands at still lacks its validation, and its samples."""
        found = (False, False)
        if self.ranks.is_main and step:
            rows, texts = read_json_lines(self.session.run.metrics_path), read_json_lines(self.session.run.samples_path)
            validated = any("validation" in row and row["step"] == step for row in rows)
            sampled = sum(row["step"] == step for row in texts) >= len(self.config.samples.prompts)
            can_validate = self.session.slice is not None and due(self.config.evaluation.every, step, self.total)
            wants_samples = due(self.config.samples.every, step, self.total)
            found = (can_validate and not validated, wants_samples and not sampled)
        return self.ranks.broadcast(found)

    def validate(self, step: int) -> None:
        """Score the frozen slice of held-out documents, on all ranks, and write it down."""
        piece = self.session.slice
        if piece is None:
            return
        length = self.config.data.sequence_length
        score = evaluate(
            self.session.model,
            piece,
            length=length,
            batch=self.plan.micro_batch,
            device=self.plan.device,
            context=lambda: self.plan.precision.context(self.plan.device),
            ranks=self.ranks,
            between=self._poll_alone,
        )
        if not (self.metrics and self.trackers):
            return
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * self.config.tokens_per_step,
            "validation": {k: getattr(score, k) for k in ("loss", "perplexity", "bits_per_byte")},
        }
        text = f"step {step:,}  held-out loss {score.loss:.4f}  perplexity {score.perplexity:.2f}  "
        text += f"bits per byte {score.bits_per_byte:.4f}"
        floor = self.session.corpus.entropy_bits_per_byte
        if floor:
            row["entropy_bits_per_byte"] = floor
            text += f"  (the source's own entropy {floor:.4f}, {score.bits_per_byte / floor - 1:.1%} above it)"
        self.metrics.append({**row, "time": time.time()})
        self.session.say(text)
        self.trackers.scalars(step, {f"validation/{k}": v for k, v in row["validation"].items()})

    def sample(self, step: int) -> None:
        """Continuations of the fixed prompts; the seed is the step's, so a resumed run writes the same."""
        if not (self.samples and self.trackers):
            return
        wanted = self.config.samples
        self.session.model.eval()
        try:
            engine = Engine.from_model(self.session.model, self.session.tokenizer)
            room = engine.context - 1
            prompts = [p for p in wanted.prompts if 0 < len(self.session.tokenizer.encode(p)) <= room]
            texts, reasons = [""] * len(prompts), [""] * len(prompts)
            sampling = SamplingParams(
                max_tokens=wanted.max_tokens, temperature=wanted.temperature, top_p=wanted.top_p, seed=step
            )
            with torch.no_grad():
                for piece in engine.stream(prompts, sampling):
                    self._poll_alone()
                    texts[piece.request] += piece.text
                    reasons[piece.request] = piece.finish_reason or reasons[piece.request]
        finally:
            self.session.model.train()
        for prompt, text, reason in zip(prompts, texts, reasons, strict=True):
            row = {"step": step, "prompt": prompt, "text": text, "finish_reason": reason, "seed": step}
            self.samples.append(row)
            self.trackers.text(step, f"samples/{prompt}", prompt + text)
        if prompts:
            shown = " ".join((prompts[0] + texts[0]).split())
            self.session.say(f"step {step:,}  writes: {shown[:160]}")

    def _poll_alone(self) -> None:
        # With several ranks a lone exception would leave the others waiting; they stop at the next step.
        if self.ranks.world == 1:
            self.stop.poll()


def due(every: int | None, step: int, total: int) -> bool:
    """Whether what is done `every` so many steps (a tenth of the run unless given) and at the last is done at this."""
    return step % (every or max(1, min(total // 10, 1000))) == 0 or step == total


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most allocated on a GPU, the resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
