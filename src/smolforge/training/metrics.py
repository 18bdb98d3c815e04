"""What a run records: metrics of its steps, validations, samples; to files, trackers and the terminal.

Rank 0 writes. Validation runs on all ranks, which share its windows.
"""

from __future__ import annotations

import logging
import mmap
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolforge.checkpoint import commit
from smolforge.data import Batch, data_digest
from smolforge.devices import known_peak_flops, to_host
from smolforge.evaluation import evaluate
from smolforge.files import read_json_lines
from smolforge.formatting import clean, plural
from smolforge.generation.engine import Engine
from smolforge.generation.sampling_params import SamplingParams
from smolforge.metrics_log import MetricsLog
from smolforge.model.architecture import CausalLM
from smolforge.model.summary import flops_per_token
from smolforge.report import write_report
from smolforge.training.checkpointing import keep_average, lowest_loss
from smolforge.training.parallel import whole_model
from smolforge.training.progress import ProgressBar, Throughput
from smolforge.training.setup import TrainContext
from smolforge.training.shutdown import GracefulShutdown
from smolforge.training.trackers import Trackers

logger = logging.getLogger(__name__)

TRACKED = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "data_seconds", "mfu")


@dataclass
class StepMetrics:
    """Metrics of one step, after which the weights had `step` updates.

    Attributes:
        batch: what this rank read.
        count: tokens that were learned, over all ranks.
        figures: as `train_step` returns them, on the host once `wait` was called.
    """

    batch: Batch
    step: int
    lr: float
    count: int
    figures: torch.Tensor
    wait: Callable[[], None]

    @classmethod
    def queue(cls, batch: Batch, step: int, lr: float, count: int, figures: Iterable[torch.Tensor]) -> StepMetrics:
        """Start to copy the figures of a step to the host, all at once."""
        return cls(batch, step, lr, count, *to_host(torch.stack([figure.float() for figure in figures])))

    @property
    def nats(self) -> float:
        """Sum of the next-token losses over all ranks."""
        return float(self.figures[0])

    @property
    def norm(self) -> float:
        """Norm of the gradient before clipping."""
        return float(self.figures[1])

    @property
    def skipped(self) -> bool:
        """Whether the update was skipped because loss or gradient were not finite."""
        return bool(self.figures[2])


class MetricsLogger:
    """Records a run: metrics.jsonl, samples.jsonl, trackers, terminal. Long work polls `shutdown`."""

    def __init__(self, context: TrainContext, shutdown: GracefulShutdown, total: int) -> None:
        self.context, self.shutdown = context, shutdown
        self.config, self.plan, self.ranks = context.config, context.plan, context.ranks
        self.total = total  # steps to train to
        self.flops = flops_per_token(self.config.model, self.config.data.sequence_length)["training"]
        self.throughput = Throughput(self.config.tokens_per_step)
        self.left_out: str | None = None  # the newest row that could not be used, since the last logged step
        self.data_seconds = 0.0  # spent waiting for data since the last logged step
        self.progress = ProgressBar(self.total)
        self.metrics: MetricsLog | None = None
        self.samples: MetricsLog | None = None
        self.trackers: Trackers | None = None

    def open(self, step: int, more_steps: int | str | None = None) -> None:
        """Open the logs of a run at `step`, without rows of later steps; record once that `--steps +N` gave more."""
        if not self.ranks.is_main:
            return
        run, config = self.context.run, self.config
        self.metrics, self.samples = MetricsLog(run.metrics_path), MetricsLog(run.samples_path)
        self.truncate_after(step)
        if 0 < step < self.total:
            self.event(step, "resume", ranks=self.ranks.world_size)
        extended = [row["length"] for row in read_json_lines(run.metrics_path) if row.get("event") == "extend"]
        if more_steps and self.total not in extended:
            self.event(step, "extend", more=more_steps, length=self.total)
        told = {row["was"] for row in read_json_lines(run.metrics_path) if row.get("event") == "data_changed"}
        for change in self.context.corpus.index.get("accepted", []):
            if change["was"] not in told:
                self.event(step, "data_changed", was=change["was"], problem=change["problem"])
        if left_out := len(config.samples.prompts) - len(self._prompts()):
            logger.warning(f"samples.prompts: {left_out} left out, because they are empty or longer than the context")
        self.trackers = Trackers(config.logging.trackers, run, config.model_dump(mode="json"), resume_step=step or None)
        self.progress.start(step)

    def close(self) -> None:
        """Close logs, trackers and progress bar."""
        self.progress.close()
        for log in (self.metrics, self.samples, self.trackers):
            if log:
                log.close()

    def truncate_after(self, step: int) -> None:
        """Remove the rows of later steps."""
        for log in (self.metrics, self.samples):
            if log:
                log.truncate_after(step)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Record an event, such as a skipped update, among the steps."""
        if self.metrics:
            self.metrics.append({"step": step, "event": event, **details, "time": time.time()})

    def log_skipped(self, metrics: StepMetrics) -> None:
        """Record a step whose update was skipped, with the documents of its batch. Called by all ranks together."""
        parts = self.ranks.all_gather([str(address) for address in metrics.batch.documents])
        documents = [name for part in parts for name in part]
        with self.ranks.together():
            self.event(metrics.step, "skipped", documents=documents, address=metrics.batch.step)
        shown = ", ".join(documents[:3]) + (f" and {len(documents) - 3} more" if len(documents) > 3 else "")
        logger.warning(f"step {metrics.step}: loss or gradient not finite, update skipped; documents read: {shown}")

    def log_step(self, metrics: StepMetrics) -> None:
        """Record a step where `logging.every` wants it. Called by all ranks together."""
        if metrics.batch.left_out:
            self.left_out = metrics.batch.left_out[-1].problem
        if metrics.step % self.config.logging.every == 0 or metrics.step in (1, self.total):
            parts = self.ranks.all_gather((metrics.batch.digests, metrics.batch.bad_rows, self.left_out))
            self.left_out = None
            with self.ranks.together():
                self._write_row(metrics, parts)
            self.data_seconds = 0.0
        self.progress.advance(metrics.step)

    def _write_row(self, metrics: StepMetrics, parts: list[tuple[Any, dict[int, int], str | None]]) -> None:
        """Write the row of a step on rank 0; `parts` are what each rank read."""
        if not (self.metrics and self.trackers):
            return
        row = self._row(metrics, [pair for digests, _, _ in parts for pair in digests])
        by_lane = {lane: count for _, rows, _ in parts for lane, count in rows.items()}  # ranks may share a lane
        if bad_rows := sum(by_lane.values()):
            row["bad_rows"] = bad_rows
        if problem := next((problem for *_, problem in parts if problem), None):
            logger.warning(f"step {metrics.step:,}: {plural(bad_rows, 'row')} left out so far, such as {problem}")
        self.metrics.append(row)
        self.trackers.scalars(metrics.step, {f"train/{k}": row[k] for k in TRACKED if k in row})
        self.progress.show(row, self.throughput.seconds_per_step)

    def _row(self, metrics: StepMetrics, digests: list[Any]) -> dict[str, Any]:
        speed = self.throughput.tokens_per_second
        row: dict[str, Any] = {
            "step": metrics.step,
            "tokens": metrics.step * self.config.tokens_per_step,
            "loss": metrics.nats / metrics.count,
            "lr": metrics.lr,
            "grad_norm": metrics.norm,
            "tokens_per_second": round(speed, 1),
            "memory_bytes": memory_in_use(self.plan.device),
            "data_seconds": round(self.data_seconds, 4),
            "data_digest": data_digest(digests),
            "time": time.time(),
        }
        peak = known_peak_flops(self.plan.device)
        if peak:
            row["mfu"] = round(speed * self.flops / peak / self.ranks.world_size, 4)
        return row

    # Validation and samples

    def catch_up(self, step: int) -> None:
        """Make up for a validation or samples of the saved step that a killed process did not reach."""
        validation, samples = self.missing(step)
        if validation:
            self.validate(step)
        if samples:
            if self.samples:
                self.samples.truncate_after(step - 1)
            self.sample(step)

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out."""
        preferences = self.context.preferences
        return self.context.eval_set is not None or bool(preferences and preferences.held_out)

    def best_step(self, step: int) -> int | None:
        """The step of the lowest held-out loss, where `evaluation.patience` ends the run at `step`; else None."""
        patience, found = self.config.evaluation.patience, None
        if patience and self.ranks.is_main:
            rows = [row for row in read_json_lines(self.context.run.metrics_path) if "validation" in row]
            if rows and rows[-1]["step"] == step:
                best = min(range(len(rows)), key=lambda i: lowest_loss(rows[i]))
                found = rows[best]["step"] if len(rows) - 1 - best >= patience else None
        return self.ranks.broadcast(found)

    def missing(self, step: int) -> tuple[bool, bool]:
        """Whether the step that the run stands at still lacks its validation, and its samples."""
        found = (False, False)
        # A model that answers already is scored before it is tuned.
        if self.ranks.is_main and (step or self.config.data.format != "text"):
            rows = read_json_lines(self.context.run.metrics_path)
            validated = any("validation" in row and row["step"] == step for row in rows)
            texts = read_json_lines(self.context.run.samples_path)
            sampled = sum(row["step"] == step for row in texts) >= len(self._prompts())
            evaluates = self.has_validation and self.is_due(self.config.evaluation.every, step)
            samples = self.is_due(self.config.samples.every, step)
            found = (evaluates and not validated, samples and not sampled)
        return self.ranks.broadcast(found)

    def is_due(self, every: int | None, step: int) -> bool:
        """Whether something is due after `step` updates: `every` so many (None: a tenth of the run, at most 1,000)."""
        return step % (every or max(1, min(self.config.total_steps // 10, 1000))) == 0 or step == self.total

    def validate(self, step: int) -> None:
        """Score the held-out documents and record the result. Called by all ranks together."""
        if not self.has_validation:
            return
        row: dict[str, Any] = {"step": step, "tokens": step * self.config.tokens_per_step, "validation": self._score()}
        text = self._shown(row["validation"])
        if entropy := self.context.corpus.entropy_bits_per_byte:
            row["entropy_bits_per_byte"] = entropy
            above = row["validation"]["bits_per_byte"] / entropy - 1
            text += f"  ({above:.1%} above the source's own entropy of {entropy:.4f})"
        average = self.context.average
        if average and average.count:
            with average.in_place():
                row["average"] = self._score()
                with self.ranks.together():
                    if self.metrics:
                        keep_average(self.context, step, *(row[name]["loss"] for name in ("validation", "average")))
            text += f"; averaged weights: {self._shown(row['average'])}"
        with self.ranks.together():
            if self.metrics and self.trackers:
                self.metrics.append({**row, "time": time.time()})
                logger.info(f"step {step:,}  {text}")
                for name in ("validation", "average"):
                    self.trackers.scalars(step, {f"{name}/{k}": v for k, v in row.get(name, {}).items()})

    def _score(self) -> dict[str, float]:
        """The scores of the model's weights on what is held out."""
        preferences, held_out = self.context.preferences, self.context.eval_set
        if preferences is not None:
            return preferences.validate(self.context.model, self.ranks, self._poll_single_rank)
        assert held_out is not None
        score = evaluate(
            self.context.model, held_out, length=self.config.data.sequence_length, batch=self.plan.micro_batch,
            device=self.plan.device, ranks=self.ranks, between=self._poll_single_rank,
            context=lambda: self.plan.precision.context(self.plan.device),
        )  # fmt: skip
        return {k: getattr(score, k) for k in ("loss", "perplexity", "bits_per_byte")}

    @staticmethod
    def _shown(scores: dict[str, float]) -> str:
        """Scores for the terminal."""
        if "margin" in scores:  # of preferences
            return f"held-out loss {scores['loss']:.4f}  margin {scores['margin']:.4f}  chosen {scores['accuracy']:.1%}"
        loss, perplexity, bits = scores["loss"], scores["perplexity"], scores["bits_per_byte"]
        return f"held-out loss {loss:.4f}  perplexity {perplexity:.2f}  bits per byte {bits:.4f}"

    def sample(self, step: int) -> None:
        """Continue the fixed prompts on rank 0. Called by all ranks together."""
        precision = self.plan.precision
        model = whole_model(self.context.model, self.ranks, precision.products)
        with self.ranks.together():
            self._write_samples(step, model)

    def _write_samples(self, step: int, model: CausalLM) -> None:
        """Continue the fixed prompts on rank 0; the step is the seed, so a resumed run writes the same."""
        prompts = self._prompts()
        if not (self.samples and self.trackers and prompts):
            return
        settings = self.config.samples.model_dump(include={"max_tokens", "temperature", "top_p"})
        engine = Engine.from_model(model, self.context.tokenizer)
        texts, reasons = [""] * len(prompts), [""] * len(prompts)
        for output in engine.stream(map(self._encode, prompts), SamplingParams(**settings, seed=step)):
            self._poll_single_rank()
            texts[output.request] += output.text
            reasons[output.request] = output.finish_reason or reasons[output.request]
        for prompt, text, reason in zip(prompts, texts, reasons, strict=True):
            row = {"step": step, "prompt": prompt, "text": text, "finish_reason": reason, "seed": step}
            self.samples.append(row)
            shown = prompt + ("" if self.config.data.format == "text" else " → ") + text
            self.trackers.text(step, f"samples/{prompt}", shown)
            if prompt is prompts[0]:
                logger.info(f"step {step:,}  sample: {clean(' '.join(shown.split()))[:160]}")

    def _prompts(self) -> list[str]:
        """The prompts that the model can continue: neither empty nor longer than its context."""
        room = self.config.model.max_position_embeddings - 1
        return [prompt for prompt in self.config.samples.prompts if 0 < len(self._encode(prompt)) <= room]

    def _encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt; of a question for a model that is tuned on chat data."""
        if self.config.data.format != "text":
            return self.context.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        return self.context.tokenizer.encode(prompt)

    def _poll_single_rank(self) -> None:
        # With several ranks an exception on one would leave the others waiting; they stop at the next step.
        if self.ranks.world_size == 1:
            self.shutdown.poll()


def memory_in_use(device: torch.device) -> int:
    """Bytes: the maximum allocated on a GPU, the resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource  # of Unix
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tell_outcome(context: TrainContext) -> None:
    """Write the report of a complete run, and tell what to do with it."""
    run = context.run
    scores = [row for row in read_json_lines(run.metrics_path) if "validation" in row]
    if scores:
        bits, entropy = scores[-1]["validation"].get("bits_per_byte"), scores[-1].get("entropy_bits_per_byte")
        above = f", {bits / entropy - 1:.1%} above the source's own entropy of {entropy:.4f}" if entropy else ""
        if bits is not None:
            logger.info(f"held-out bits per byte: {bits:.4f}{above}")
    best = run.path
    if averages := commit.steps(run.average_path):
        best = run.average_path
        logger.info(f"average:    {best}, the lowest held-out loss (step {averages[-1]:,})")
    logger.info(f"checkpoint: {commit.newest_whole(run.checkpoints_path)}")
    logger.info(f"report:     {write_report(run.path)}")
    logger.info(f"generate:   smolforge generate {shlex.quote(str(best))}")
