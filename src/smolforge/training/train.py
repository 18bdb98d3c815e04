"""`smolforge train` from top to bottom: open, step, save, evaluate.

Order within a step: wait for the batch, agree with the other ranks whether to stop, run the micro-batches, update, log.
Then, where due: save, validate, sample. Saving comes first, so that a crash in evaluation loses nothing. On a GPU
metrics are read one step late, so that reading them never makes the device wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

from smolforge.checkpoint import commit
from smolforge.checkpoint.background import Committer
from smolforge.checkpoint.parts import Parts
from smolforge.data import Batch, Loader
from smolforge.devices import choose_device, to_device
from smolforge.distributed import DistributedContext, init_distributed
from smolforge.errors import RunFailed, SourceUnavailable
from smolforge.run import Run, lock_run
from smolforge.slurm import read_slurm
from smolforge.training import checkpointing, setup
from smolforge.training.apply_plan import compiled_graphs, release_freed_memory, run_first_step
from smolforge.training.checkpointing import Position
from smolforge.training.finetuning import learned_targets
from smolforge.training.metrics import MetricsLogger, StepMetrics, tell_outcome
from smolforge.training.optim import schedule_factor
from smolforge.training.progress import Throughput, build_profiler
from smolforge.training.ranks import check_ranks
from smolforge.training.recorded import RecordedPasses
from smolforge.training.setup import TrainContext, TrainRequest
from smolforge.training.shutdown import GracefulShutdown, StopRequested
from smolforge.training.step import Replica, dropout_keys, replicate, train_step

logger = logging.getLogger(__name__)

BAD_STEPS = 3  # non-finite steps in a row after which a run rolls back
# What a rank found when it wanted its next batch; a rank that waits for long says so every few seconds.
READY, WAITING, STOP, FAILED, SOURCE_UNAVAILABLE = range(5)
WAITING_SECONDS = 5.0


def run_training(request: TrainRequest) -> tuple[Run, GracefulShutdown]:
    """Train as requested; the run, and whether and why it stopped early (its `exit_code` is 0, 130 or 143).

    Raises:
        SmolforgeError: bad input (nothing was changed), or the run failed (what could be saved was saved).
    """
    read_slurm(os.environ)
    device = choose_device()
    ranks = init_distributed(device)
    run = setup.choose_run(request)
    with GracefulShutdown(request.time_limit) as shutdown, contextlib.ExitStack() as stack, ranks.one_error():
        stack.callback(ranks.close)
        try:
            context, position = open_run(request, run, ranks, device, stack)
            shutdown.immediate = False
            trainer = Trainer(context, position, shutdown, request.until)
            if not trainer.is_complete(request.more_steps):
                if not run.exists:
                    setup.record(context)
                if request.profile and ranks.is_main:
                    trainer.profiler = build_profiler(run.path / "profile", position.step, trainer.total, device)
                trainer.run(request.more_steps)
                if ranks.is_main:
                    tell_outcome(context)
        except StopRequested:
            saved = f"saved. Continue with: {run.resume_command}" if run.exists else "nothing was written yet"
            logger.info(f"{shutdown.reason}: {saved}")
    return run, shutdown


def open_run(
    request: TrainRequest, run: Run, ranks: DistributedContext, device: torch.device, stack: contextlib.ExitStack
) -> tuple[TrainContext, Position]:
    """Lock the run's directory and open all that its steps need; the context, and the position to train from."""
    place = setup.cleared_place(run, fresh=request.fresh) if ranks.is_main else contextlib.nullcontext()
    with place:
        ranks.barrier()
        newest = ranks.broadcast(commit.newest_whole(run.checkpoints_path) if ranks.is_main else None)
        config = setup.adopt_init(setup.resolve_config(request, run, newest), newest, request)
        if ranks.is_main:
            run.prepare()
            stack.enter_context(lock_run(run))
            commit.sweep(run.checkpoints_path)
            if newest is None:
                setup.forget_preparations(run)
        check_ranks(run, config, ranks)
        context = setup.build_context(request, run, config, newest, ranks, device)
    stack.callback(context.corpus.close)  # a thread that waits for a network would keep the process alive
    position = Position()
    if newest is not None:
        position = checkpointing.restore(context, newest)
        logger.info(f"resuming {run.path} from step {position.step:,}")
        setup.announce_changes(run, context.config, position.step)
    if request.skip:
        position = replace(position, skip=checkpointing.left_out(position, request.skip))
    return context, position


# Step


class RollBack(Exception):
    """Three steps in a row were not finite."""


class Trainer:
    """Trains a run from its position to its end, or until it is asked to stop."""

    def __init__(self, context: TrainContext, position: Position, shutdown: GracefulShutdown, end: int | None) -> None:
        self.context, self.position, self.shutdown = context, position, shutdown
        self.config, self.plan, self.ranks = context.config, context.plan, context.ranks
        self.total = min(self.config.total_steps, end or self.config.total_steps)
        self.metrics = MetricsLogger(context, shutdown, self.total)
        self.pending: deque[StepMetrics] = deque()  # steps whose metrics were not read yet
        self.bad: list[StepMetrics] = []  # the last steps, as far as not finite
        self.save_began, self.save_seconds = 0.0, 0.0  # the longest save, with the writing in the background
        self.saved_step = position.step if position.cursor else -1
        self.updating = False  # the weights are between two steps
        self.replica: Replica | None = None
        self.passes = RecordedPasses(context.model) if self.plan.graph else None
        self.profiler: profile | None = None
        self.parts: Parts | None = None  # of the checkpoint that is written last
        self.committer = Committer(
            context.run.checkpoints_path, asynchronous=self.config.checkpoint.asynchronous, after=self._after_save
        )

    def is_complete(self, more_steps: int | str | None = None) -> bool:
        """Whether nothing is left to do; the user is told. `more_steps` as of `TrainRequest`."""
        step, run = self.position.step, self.context.run
        if any(self.metrics.missing(step)):
            return False
        if step < self.total:
            return not more_steps and self._stops_early()
        asked = f"; you asked for {self.total:,}" if step > self.total else ""
        logger.info(
            f"{run.path} already has {step:,} steps{asked}. "
            f"`{run.resume_command} --steps +50` trains fifty more, `--fresh` starts over."
        )
        return True

    def run(self, more_steps: int | str | None = None) -> None:
        """Train to the end; `more_steps` as of `TrainRequest`, for the log.

        Raises:
            StopRequested: a signal or the time limit; the state was saved.
            SmolforgeError: the run failed; what could be saved was saved.
        """
        self.metrics.open(self.position.step, more_steps)
        # A save in flight ends or fails where the committer is left; its failure does not hide an earlier error.
        with contextlib.closing(self.metrics), self.committer, self.profiler or contextlib.nullcontext():
            try:
                self.metrics.catch_up(self.position.step)
                self._replicate()
                if self.config.data.format != "text":  # a laptop tunes beside other programs
                    release_freed_memory()
                while self.position.step < self.total:
                    try:
                        self._steps()
                    except RollBack:
                        self._roll_back()
            except StopRequested:
                self._save(last=True)
                raise
            except Exception as error:
                self._save_before(error)
                raise

    def _replicate(self) -> None:
        self.replica = None  # at most one may hear of the gradients
        if self.plan.parallel == "ddp":
            self.replica = replicate(self.context.model, self.ranks, compiled=self.plan.compile)

    def _steps(self) -> None:
        """Step until the end, a stop, or a roll-back."""
        context, config = self.context, self.config
        with Loader(
            context.corpus, context.tokenizer, sequences_per_step=config.sequences_per_step, rank=self.ranks.rank,
            world=self.ranks.world_size, cursor=self.position.cursor, skip_steps=self.position.skip,
        ) as loader:  # fmt: skip
            self.metrics.throughput = Throughput(config.tokens_per_step)
            graphs = None  # compiled so far; None before the first step
            while self.position.step < self.total:
                with record_function("wait for data"):
                    batch = self._next_batch(loader)
                if graphs is None and self.plan.compile:
                    run_first_step(
                        lambda b=batch: self._step(b), context.model, context.optimizer, retry=self._replicate
                    )
                else:
                    self._step(batch)
                if graphs is not None and compiled_graphs() > graphs:
                    logger.info(f"step {self.position.step:,}: compiled again, {compiled_graphs()} graphs by now")
                if graphs is None:
                    with self.ranks.together():
                        setup.record(context)  # all of the configuration is known to work
                    self.ranks.expect_steps(long=not config.checkpoint.asynchronous)
                graphs = compiled_graphs()
                self.metrics.throughput.tick()
                self._flush_metrics(keep=0 if self.plan.device.type == "cpu" else 1)
                if self.profiler:
                    self.profiler.step()
                self._save_and_evaluate()

    def _next_batch(self, loader: Loader) -> Batch:
        """The next batch, unless a rank is asked to stop or cannot read its data; then all ranks stop together."""
        began = time.perf_counter()
        batch, error, status = None, None, WAITING
        while status == WAITING:
            mine, until = WAITING if batch is None else READY, time.monotonic() + WAITING_SECONDS
            try:
                self.committer.poll()
                while mine == WAITING and time.monotonic() < until:
                    if self.shutdown.requested(margin=self.save_seconds + 2 * self.metrics.throughput.seconds_per_step):
                        mine = STOP
                    elif loader.wait(0.2):
                        batch, mine = next(loader), READY
            except Exception as caught:
                error, mine = caught, SOURCE_UNAVAILABLE if isinstance(caught, SourceUnavailable) else FAILED
            # From here on all ranks act on the same status.
            status = self.ranks.max(mine)
        self.metrics.data_seconds += time.perf_counter() - began
        if status == READY:
            assert batch is not None
            return batch
        self._flush_metrics(keep=0)
        if status == STOP:
            self.shutdown.follow()
            raise StopRequested
        if error is None and status == SOURCE_UNAVAILABLE:
            error = SourceUnavailable("another process could not read its data; the run was saved")
            error.is_reported = True
        raise self.ranks.agree(error)

    def _step(self, batch: Batch) -> None:
        """One update with a batch."""
        step, config, context, device = self.position.step, self.config, self.context, self.plan.device
        with self.ranks.together():
            tokens = to_device(torch.from_numpy(batch.tokens), device).long()
            document_ids = torch.from_numpy(batch.document_ids) if config.data.mask_documents else None
        lr = config.optimizer.lr * schedule_factor(config.schedule, step, config.total_steps)
        targets, count = learned_targets(batch, tokens, self.ranks)
        objective = None
        if context.preferences is not None:
            objective, count = context.preferences.objective(batch, self.ranks)
        figures = train_step(
            context.model, context.optimizer, self.plan, config, tokens, document_ids,
            targets=targets, count=count, lr=lr, ranks=self.ranks, scaler=context.scaler, span=self._span,
            replica=self.replica, passes=self.passes, objective=objective, keys=dropout_keys(config, batch, device),
        )  # fmt: skip
        if context.average:
            context.average.update()
        self.updating = False
        self.position.step, self.position.cursor = step + 1, batch.cursor
        learned = count or config.tokens_per_step
        self.pending.append(StepMetrics.queue(batch, step + 1, lr, learned, figures))

    def _span(self, name: str) -> AbstractContextManager[Any]:
        self.updating = name == "update"
        return record_function(name)

    def _flush_metrics(self, keep: int) -> None:
        """Read and record the metrics of all but the newest `keep` steps; RollBack after three not finite in a row."""
        while len(self.pending) > keep:
            metrics = self.pending.popleft()
            metrics.wait()
            if self.ranks.max(int(metrics.skipped)):  # all ranks decide alike
                self.bad.append(metrics)
                self.metrics.log_skipped(metrics)
                if len(self.bad) >= BAD_STEPS:
                    raise RollBack
            else:
                self.bad.clear()
            self.metrics.log_step(metrics)

    def _roll_back(self) -> None:
        """Restore the newest checkpoint before the steps that were not finite, and leave their data out."""
        start, batches = self.bad[0].step, [bad.batch.step for bad in self.bad]
        self.pending.clear()
        self.bad.clear()
        limit = self.config.training.rollbacks
        where = f"three steps in a row were not finite from step {start} on"
        if self.position.rollbacks >= limit:
            raise RunFailed(
                f"{where}, after {limit} roll-backs",
                hint="metrics.jsonl names the documents of each skipped step. Try a lower optimizer.lr, a longer "
                "schedule.warmup or training.precision=fp32, and resume.",
            )
        self._wait_for_save()
        directory = checkpointing.newest_before(self.context, start)
        if directory is None:
            raise RunFailed(
                f"{where}, before the first checkpoint", hint="Try a lower optimizer.lr or a longer schedule.warmup."
            )
        count, first, last = self.position.rollbacks + 1, min(batches), max(batches)
        with self.ranks.together():
            restored = checkpointing.restore(self.context, directory)
            self.position = replace(restored, skip=[*restored.skip, (first, last + 1)], rollbacks=count)
            self.metrics.truncate_after(self.position.step)
            self.metrics.event(self.position.step, "rollback", skipped=[first, last + 1], count=count)
        logger.warning(
            f"rolled back to step {self.position.step}; batches {first + 1} to {last + 1} of the stream are left out "
            f"({count} of at most {limit} roll-backs)"
        )

    # Save and evaluate

    def _save_and_evaluate(self) -> None:
        """Save, validate, sample and keep a frame where due."""
        step, config = self.position.step, self.config
        parts = (config.checkpoint, config.evaluation, config.samples)
        save, validate, sample = (self.metrics.is_due(part.every, step) for part in parts)
        if not (save or validate or sample or step in checkpointing.frame_steps(config.total_steps)):
            return
        self._flush_metrics(keep=0)
        began = time.perf_counter()
        checkpointing.write_frame(self.context, step, config.total_steps)
        if save and (not self.bad or step == self.total):  # no checkpoint amid steps that are not finite
            self._save()
        if validate:
            self.metrics.validate(step)
        if ends := validate and self._stops_early():
            self.total = step
            self.metrics.event(step, "ended")
            self._save(last=True)
        if sample or ends:
            self.metrics.sample(step)
        if validate and save:
            self._wait_for_save()
            with self.ranks.together():
                checkpointing.prune_checkpoints(self.context)
        if config.data.format != "text":
            release_freed_memory()
        self.metrics.throughput.pause(time.perf_counter() - began)

    def _stops_early(self) -> bool:
        """Whether the held-out loss has not fallen for as long as `evaluation.patience` says; the user is told."""
        step = self.position.step
        best = self.metrics.best_step(step)
        if best is None:
            return False
        logger.info(
            f"ends at step {step:,} of {self.config.total_steps:,}: the held-out loss is lowest at step {best:,} "
            f"(evaluation.patience={self.config.evaluation.patience}; with null it trains on)"
        )
        return True

    def _save(self, *, last: bool = False) -> None:
        """Save the run's state, unless it is saved; wait for the end of it where nothing comes after it."""
        step = self.position.step
        if step not in (0, self.saved_step):
            self.save_began = time.perf_counter()
            self._flush_metrics(keep=0)
            self._wait_for_save()
            self.parts = checkpointing.start_save(self.context, self.position, self.committer)
            self.saved_step = step
        if last or step == self.total:
            self._wait_for_save()

    def _wait_for_save(self) -> None:
        """Wait together for what rank 0 still writes: the others learn all the time that it is alive."""
        while self.ranks.max(int(self.committer.busy)):
            time.sleep(0.02)
        with self.ranks.together():
            self.committer.wait()

    def _save_before(self, error: Exception) -> None:
        """Save what an error would lose, between two updates; several ranks only where all of them know of it."""
        step = self.position.step
        if self.parts and error not in self.ranks.agreed:
            self.parts.abandon()
        can = error in self.ranks.agreed if self.ranks.world_size > 1 else not isinstance(error, RunFailed)
        if self.updating or not can or step in (0, self.saved_step):
            return
        try:
            self._save(last=True)
        except Exception as second:  # the first error is the one to tell
            logger.warning(f"step {step:,} could not be saved: {second}")
        else:
            logger.info(f"step {step:,} was saved before the error. Continue with: {self.context.run.resume_command}")

    def _after_save(self, directory: Path) -> None:
        """A checkpoint was committed. Called in the thread that saves."""
        self.save_seconds = max(self.save_seconds, time.perf_counter() - self.save_began)
        checkpointing.prune_checkpoints(self.context)
