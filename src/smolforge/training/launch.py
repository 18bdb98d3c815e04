"""`--nproc`: the processes of a run on this machine, started by torch's elastic agent.

The agent gives each its RANK and the address of the others, and ends the rest when one fails. Unlike `torchrun` this
passes every signal on and waits for the run to be saved, and the exit code is the run's own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch

from smolforge.config import build_config
from smolforge.errors import BadInput, RunFailed
from smolforge.slurm import read_slurm
from smolforge.training.recipe import resolve_batch
from smolforge.training.setup import TrainRequest, base_of
from smolforge.training.shutdown import EXIT_CODES

logger = logging.getLogger(__name__)

STARTED_BY = "SMOLFORGE_NPROC"  # set for the processes that this module starts


def launch(request: TrainRequest, asked: str | None, words: Sequence[str]) -> int | None:
    """Train in several processes where they are wanted; the exit code, or None where this process is to train.

    Args:
        asked: `--nproc`: a number, `auto` for all GPUs of this machine, None for `auto` unless a launcher has started
            this process.
        words: the command line, which each process runs.

    Raises:
        BadInput: `asked` is not such a word, or a launcher has started this process.
        RunFailed: a process was killed.
    """
    read_slurm(os.environ)
    if "WORLD_SIZE" in os.environ:
        if asked is not None and STARTED_BY not in os.environ:
            raise BadInput("a launcher has started this process already", field="--nproc", hint="Leave --nproc out.")
        return None
    count = _count_processes(request, asked)
    return None if count == 1 else start_processes(count, words)


def _count_processes(request: TrainRequest, asked: str | None) -> int:
    if asked not in (None, "auto"):
        if not asked.isdigit() or int(asked) < 1:
            raise BadInput(f"{asked!r} is not a number of processes", field="--nproc", hint="Give 1 or more, or auto.")
        return int(asked)
    usable = os.environ.get("SMOLFORGE_DEVICE", "auto") in ("auto", "cuda")
    gpus = torch.cuda.device_count() if usable else 0
    if gpus < 2:
        return 1
    config = build_config(base_of(request), list(request.overrides), **request.layers)
    config = resolve_batch(config, torch.device("cuda"))
    sequences = config.sequences_per_step
    each = -(-sequences // gpus)  # of the GPU that has most to do; more processes would not make a step shorter
    count = -(-sequences // each)
    which = "one for each GPU of this machine" if count == gpus else f"for {gpus} GPUs and {sequences} sequences a step"
    logger.info(f"processes: {count}, {which} (--nproc 1 uses one GPU)")
    return count


def start_processes(count: int, words: Sequence[str]) -> int:
    """Run a command line of smolforge in `count` processes that train together; their exit code.

    Raises:
        RunFailed: one of them was killed.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The agent's own handlers would kill a process that saves for 30 s, and forget its exit code: it has none.
    os.environ |= {STARTED_BY: str(count), "TORCHELASTIC_SIGNALS_TO_HANDLE": ""}
    parameters = RendezvousParameters("c10d", "127.0.0.1:0", f"smolforge-{os.getpid()}", 1, 1, "127.0.0.1")
    rendezvous = get_rendezvous_handler(parameters)
    with tempfile.TemporaryDirectory(prefix="smolforge-") as folder:
        spec = WorkerSpec(
            role="train", local_world_size=count, entrypoint=sys.executable, args=("-m", "smolforge", *words),
            rdzv_handler=rendezvous, max_restarts=0, monitor_interval=0.1, local_addr="127.0.0.1",
        )  # fmt: skip
        agent: Any = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder))
        try:
            with _signals_passed_on(agent):
                failures = agent.run().failures
        finally:
            rendezvous.shutdown()  # or its thread may drop the last reference to itself, and fail to wait for its end
    return exit_code({rank: failure.exitcode for rank, failure in failures.items()})


@contextlib.contextmanager
def _signals_passed_on(agent: Any) -> Iterator[None]:
    """Pass signals on to the processes, which save and end; before they are started this process ends."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        started = [worker.id for worker in agent.get_worker_group().workers if worker.id]
        if not started:
            sys.exit(EXIT_CODES[signal.Signals(number)])
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)

    before = {number: signal.signal(number, pass_on) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(codes: dict[int, int]) -> int:
    """The exit code of a run from those of its ranks that did not end with 0.

    A rank's own error counts, then that another has ended, then that it was asked to stop, which the agent does to the
    others when one has failed. Of SIGINT and SIGTERM it is SIGINT: a rank that another told to stop says SIGTERM.

    Raises:
        RunFailed: a signal killed a rank.
    """
    killed = {rank: signal.Signals(-code).name for rank, code in codes.items() if code < 0 and -code not in EXIT_CODES}
    own = [code for code in codes.values() if code > 1 and code not in EXIT_CODES.values()]
    if killed and not own:
        rank, name = next(iter(killed.items()))
        hint = "Where nobody sent it, the machine ran out of memory. The same command continues the run."
        raise RunFailed(f"process {rank} was killed by {name}", hint=hint)
    stopped: Iterable[int] = (EXIT_CODES.get(signal.Signals(-code), 1) if code < 0 else code for code in codes.values())
    return own[0] if own else 1 if 1 in codes.values() else min(stopped, default=0)
