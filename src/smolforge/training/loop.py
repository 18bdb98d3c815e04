"""The steps of a run.

Order within a step: wait for the batch (polling for signals), agree with the other ranks whether to stop, run the
micro-batches, update, log. Then, where due: save, validate, write samples. Saving comes first, so that a crash in
evaluation loses nothing. StepMetrics are read from the device one step late where reading would make it wait.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque

import torch
from torch.profiler import record_function

from smolforge.checkpoint import commit
from smolforge.checkpoint.background import Committer
from smolforge.data import Batch, Loader
from smolforge.errors import RunFailed, SmolforgeError, SourceUnavailable
from smolforge.training import apply_plan, checkpointing, compiling, schedules
from smolforge.training.checkpointing import Position
from smolforge.training.metrics import MetricsLogger, StepMetrics, due
from smolforge.training.profiling import Profiler
from smolforge.training.progress import Console, Throughput
from smolforge.training.setup import TrainContext
from smolforge.training.shutdown import GracefulShutdown, StopRequested
from smolforge.training.update import Updater

BAD_STEPS = 3  # non-finite steps in a row after which a run goes back


class RollBack(Exception):
    """Three steps in a row were not finite; `first` is the first of them, `ranges` their addresses in the stream."""

    def __init__(self, first: int, addresses: list[int]) -> None:
        super().__init__(first)
        self.first, self.addresses = first, addresses


class Loop:
    """Runs a session from where it stands to its end, or until it is asked to stop."""

    def __init__(self, session: TrainContext, position: Position, stop: GracefulShutdown, console: Console) -> None:
        self.session, self.position, self.stop, self.console = session, position, stop, console
        self.config, self.plan, self.ranks = session.config, session.plan, session.ranks
        self.total = self.config.total_steps
        self.updater = Updater(
            session.model, session.optimizer,
            clip=self.config.training.grad_clip, ranks=self.ranks, scaler=session.scaler,
        )  # fmt: skip
        self.pace = Throughput(self.config.tokens_per_step)
        self.pending: deque[StepMetrics] = deque()
        self.bad: list[StepMetrics] = []
        self.data_seconds = 0.0
        self.save_seconds = 0.0
        self.saved_step = position.step if position.cursor else -1
        self.observer = MetricsLogger(session, stop, console)
        self.profiler: Profiler | None = None
        self.committer = Committer(
            session.run.checkpoints_path,
            asynchronous=self.config.checkpoint.asynchronous,
            after=lambda path: checkpointing.prune(session),
        )

    def run(self) -> None:
        """Train to the end.

        Raises:
            StopRequested: a signal or the time limit; the state was saved.
            SmolforgeError: the run failed; what could be saved was saved.
        """
        if self.ranks.is_main:
            self.observer.open(self.position.step)
        self.console.start(self.total, self.position.step)
        if self.profiler:
            self.profiler.start()
        try:
            self.observer.catch_up(self.position.step)
            while self.position.step < self.total:
                try:
                    self._steps()
                except RollBack as trouble:
                    self._roll_back(trouble)
        except StopRequested:
            self._save()
            raise
        finally:
            self.console.stop()
            # What is being written is finished or fails here; a failure must not hide the first error.
            failing = sys.exc_info()[0] is not None
            with contextlib.suppress(SmolforgeError) if failing else contextlib.nullcontext():
                self.committer.close()
            self.observer.close()
            if self.profiler:
                self.profiler.close()

    def _steps(self) -> None:
        """Step until the end, a stop, or a roll-back."""
        session, config = self.session, self.config
        with Loader(
            session.corpus,
            session.tokenizer,
            sequences_per_step=config.sequences_per_step,
            rank=self.ranks.rank,
            world=self.ranks.world,
            cursor=self.position.cursor,
            skip_steps=self.position.skip,
        ) as loader:
            self.pace = Throughput(config.tokens_per_step)
            first, compiled = True, 0
            apply_plan.apply_plan(session.optimizer, self.plan)
            while self.position.step < self.total:
                with record_function("wait for data"):
                    batch = self._next_batch(loader)
                if first and self.plan.compile:
                    compiling.with_fallback(
                        lambda b=batch: self._train(b), session.model, session.optimizer, session.say
                    )
                else:
                    self._train(batch)
                if first:
                    first, compiled = False, compiling.graphs()
                self._flush_metrics(keep=0 if self.plan.device.type == "cpu" else 1)
                if self.profiler:
                    self.profiler.step(self.position.step)
                self.pace.tick()
                self._after_step()
                self.committer.poll()
                if compiling.graphs() > compiled:
                    compiled = compiling.graphs()
                    session.say(f"step {self.position.step:,}: compiled again, {compiled} graphs by now")

    def _next_batch(self, loader: Loader) -> Batch:
        """The next batch, unless any rank is asked to stop or has lost its source."""
        began = time.perf_counter()
        batch, trouble = None, None
        while not self.stop.requested(margin=self.save_seconds + 2 * self.pace.seconds_per_step):
            try:
                if loader.wait(0.2):
                    batch = next(loader)
                    break
            except SourceUnavailable as error:
                trouble = error
                break
        self.data_seconds += time.perf_counter() - began
        if self.ranks.any(batch is None):
            self._flush_metrics(keep=0)
            if trouble or self.ranks.any(trouble is not None):
                self._save()
                raise trouble or SourceUnavailable("another rank lost its source; the run was saved")
            raise StopRequested
        assert batch is not None
        return batch

    def _train(self, batch: Batch) -> None:
        """One step: gradients of the whole global batch, one update."""
        config, device, model = self.config, self.plan.device, self.session.model
        tokens = torch.from_numpy(batch.tokens)
        documents = torch.from_numpy(batch.document_ids) if config.data.mask_documents else None
        if device.type == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
            documents = documents.pin_memory().to(device, non_blocking=True) if documents is not None else None
        tokens = tokens.long()
        total = torch.zeros((), dtype=torch.float32, device=device)
        for start in range(0, len(tokens), self.plan.micro_batch):
            rows = slice(start, start + self.plan.micro_batch)
            ids = None if documents is None else documents[rows, :-1].contiguous()
            inputs, targets = tokens[rows, :-1].contiguous(), tokens[rows, 1:].contiguous()
            with record_function("forward"), self.plan.precision.context(device):
                loss, nats = model.loss(
                    inputs, targets, document_ids=ids, scale=1 / config.tokens_per_step,
                    z_weight=config.training.z_loss,
                )  # fmt: skip
            with record_function("backward"):
                self.updater.backward(loss)
            total += nats.float()
        lr = config.optimizer.lr * schedules.rate(config.schedule, self.position.step, self.total)
        with record_function("update"):
            norm, skipped = self.updater.step(lr, total)
        self.position.step += 1
        self.position.cursor = batch.cursor
        self.pending.append(StepMetrics(batch, self.position.step, total, norm, skipped, lr))

    def _flush_metrics(self, keep: int) -> None:
        """Read the figures of all but the newest `keep` steps; log them, and look for trouble."""
        while len(self.pending) > keep:
            figures = self.pending.popleft()
            if bool(figures.skipped):
                self._skipped(figures)
            else:
                self.bad.clear()
            every = self.config.logging.every
            if figures.step % every == 0 or figures.step in (1, self.total):
                self.observer.figures(figures, self.pace, self.data_seconds)
                self.data_seconds = 0.0
            self.console.advance(figures.step)

    def _skipped(self, figures: StepMetrics) -> None:
        """A step whose loss or gradient was not finite: its update did not happen."""
        self.bad.append(figures)
        documents = [str(address) for address in figures.batch.documents]
        gathered = [name for part in self.ranks.gather(documents) for name in part]
        self.observer.event(figures.step, "skipped", documents=gathered, address=figures.batch.step)
        shown = ", ".join(gathered[:3]) + (f" and {len(gathered) - 3} more" if len(gathered) > 3 else "")
        self.session.say(f"step {figures.step}: loss or gradient not finite, update skipped; its documents: {shown}")
        if len(self.bad) >= BAD_STEPS:
            raise RollBack(self.bad[0].step, [f.batch.step for f in self.bad])

    def _roll_back(self, trouble: RollBack) -> None:
        """Go back to the newest checkpoint before the trouble and leave its data out."""
        self.pending.clear()
        self.bad.clear()
        self.session.optimizer.zero_grad(set_to_none=True)
        limit = self.config.training.rollbacks
        if self.position.rollbacks >= limit:
            raise RunFailed(
                f"three steps in a row were not finite from step {trouble.first} on, after {limit} roll-backs",
                hint="metrics.jsonl names the documents of each skipped step. Try a lower optimizer.lr, a longer "
                "schedule.warmup or training.precision=fp32, and resume.",
            )
        self.committer.wait()
        self.ranks.barrier()
        checkpoints = self.session.run.checkpoints_path
        good = [s for s in commit.steps(checkpoints) if s < trouble.first]
        directory = next(
            (d for s in reversed(good) if not commit.verify(d := checkpoints / commit.step_name(s))),
            None,
        )
        if directory is None:
            raise RunFailed(
                f"three steps in a row were not finite from step {trouble.first} on, before the first checkpoint",
                hint="Try a lower optimizer.lr or a longer schedule.warmup.",
            )
        rollbacks = self.position.rollbacks + 1
        position = checkpointing.restore(self.session, directory)
        first, last = min(trouble.addresses), max(trouble.addresses)
        position.skip = [*position.skip, (first, last + 1)]
        position.rollbacks = rollbacks
        self.position = position
        self.observer.truncate_after(position.step)
        self.observer.event(position.step, "rollback", skipped=[first, last + 1], count=rollbacks)
        self.session.say(
            f"rolled back to step {position.step}; batches {first}..{last} of the stream are left out "
            f"({rollbacks} of at most {limit} roll-backs)"
        )

    def _after_step(self) -> None:
        """Save, validate and sample where due."""
        step, config = self.position.step, self.config
        save, validate, sample = (
            due(part.every, step, self.total) for part in (config.checkpoint, config.evaluation, config.samples)
        )
        if not (save or validate or sample):
            return
        self._flush_metrics(keep=0)
        began = time.perf_counter()
        # A state in the middle of trouble is no state to come back to.
        if save and (not self.bad or step == self.total):
            self._save()
        if validate:
            self.observer.validate(step)
        if sample:
            self.observer.sample(step)
        if validate and save and self.ranks.is_main:
            self.committer.wait()
            checkpointing.prune(self.session)
        self.pace.pause(time.perf_counter() - began)

    def _save(self) -> None:
        """Begin the checkpoint of where the run stands, and wait for it unless saving is asynchronous."""
        step = self.position.step
        if step == self.saved_step or step == 0:
            self.committer.wait()
            return
        began = time.perf_counter()
        self._flush_metrics(keep=0)
        tree = checkpointing.state_tree(self.session, self.position)
        if self.ranks.is_main:
            self.committer.save(step, tree, checkpointing.writer(self.session, step))
            if step == self.total or self.stop.requested():
                self.committer.wait()
        self.saved_step = step
        self.save_seconds = max(self.save_seconds, time.perf_counter() - began)
        self.ranks.barrier()
