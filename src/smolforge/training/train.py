"""`smolforge train`: from what was asked to a finished run, or to a saved one and the command that goes on."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import replace
from pathlib import Path

import torch

from smolforge import distributed
from smolforge.checkpoint import commit
from smolforge.distributed import DistributedContext
from smolforge.lock import RunLock
from smolforge.metrics_log import read_metrics
from smolforge.report import write_report
from smolforge.run import Run
from smolforge.training import checkpointing, plan, setup
from smolforge.training.checkpointing import Position
from smolforge.training.loop import Loop
from smolforge.training.profiling import Profiler
from smolforge.training.progress import Console
from smolforge.training.setup import TrainContext, TrainRequest
from smolforge.training.shutdown import GracefulShutdown, StopRequested


def train(request: TrainRequest, *, quiet: bool = False) -> tuple[Run, int]:
    """Begin or go on with a run.

    Returns:
        The run, and an exit code: 0 done, 130 or 143 stopped by a signal after the state was saved.

    Raises:
        SmolforgeError: bad input (nothing was changed), or the run failed (what could be saved was saved).
    """
    device = plan.pick_device()
    ranks = distributed.init_distributed(device)
    console = Console(quiet=quiet or not ranks.is_main)
    run = setup.choose_place(request)
    with GracefulShutdown(request.time_limit, console.say) as stop, contextlib.ExitStack() as stack:
        stack.callback(ranks.close)
        try:
            session, position = _open(request, run, ranks, device, console, stack)
            stop.eager = False
            loop = Loop(session, position, stop, console)
            if position.step >= session.config.total_steps and not any(loop.observer.owed(position.step)):
                console.say(
                    f"{run.path} is complete: {position.step:,} of {session.config.total_steps:,} steps. "
                    f"`{_again(run)} --steps +50` trains fifty more, `--fresh` starts over."
                )
                return run, 0
            if ranks.is_main:
                run.write_config(session.config.to_yaml())
                setup.write_environment(session, request.command)
                if request.profile:
                    remaining = session.config.total_steps - position.step
                    loop.profiler = Profiler(run.path, remaining, device, console.say)
            loop.run()
        except StopRequested:
            saved = f"saved. Go on with: {_again(run)}" if run.exists else "nothing was begun yet"
            console.say(f"{stop.reason}: {saved}")
            return run, stop.exit_code
        if ranks.is_main:
            _finish(session, console)
    return run, 0


def _open(
    request: TrainRequest,
    run: Run,
    ranks: DistributedContext,
    device: torch.device,
    console: Console,
    stack: contextlib.ExitStack,
) -> tuple[TrainContext, Position]:
    """Take the run's place and lock, and open all that its steps need."""
    if ranks.is_main:
        if request.fresh and run.exists:
            with RunLock(run):
                pass  # nobody else is writing it
            setup.move_aside(run, console.say)
        run.check_place()
    ranks.barrier()
    newest = ranks.broadcast(commit.newest_whole(run.checkpoints_path) if ranks.is_main else None)
    config = setup.adopt_init(setup.resolve_config(request, run, newest), newest)
    config = plan.resolve_batch(config, device)
    if ranks.is_main:
        run.prepare()
        stack.enter_context(RunLock(run))
        commit.sweep(run.checkpoints_path)
    ranks.barrier()
    session = setup.open_session(run, config, newest, ranks, device, console.say)
    stack.callback(session.corpus.close)  # a thread that waits for a network would keep the process from ending
    return session, _begin(session, newest, request, console)


def _begin(session: TrainContext, newest: Path | None, request: TrainRequest, console: Console) -> Position:
    position = Position()
    if newest is not None:
        position = checkpointing.restore(session, newest)
        console.say(f"resuming {session.run.path} from step {position.step:,}")
    if request.skip:
        position = replace(position, skip=sorted({*position.skip, *request.skip}))
    return position


def _finish(session: TrainContext, console: Console) -> None:
    run = session.run
    path = write_report(run.path)
    scores = [row for row in read_metrics(run) if "validation" in row]
    if scores:
        bits = scores[-1]["validation"]["bits_per_byte"]
        floor = scores[-1].get("entropy_bits_per_byte")
        gap = f", {bits / floor - 1:.1%} above the source's own entropy of {floor:.4f}" if floor else ""
        console.say(f"held-out bits per byte: {bits:.4f}{gap}")
    last = commit.newest_whole(run.checkpoints_path)
    console.say(f"checkpoint: {last}")
    console.say(f"report:     {path}")
    console.say(f"write:      smolforge generate {shlex.quote(str(run.path))}")


def _again(run: Run) -> str:
    return f"smolforge train --out {shlex.quote(str(run.path))}"
