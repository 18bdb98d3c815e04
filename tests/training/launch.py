"""Runs of smolforge as processes of their own, to be killed, signalled and starved."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from smolforge.files import read_json_lines
from smolforge.run import Run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
PATIENCE = 120.0  # seconds until a process that should have ended is a failure


def start(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, *, first: str = ""
) -> subprocess.Popen[str]:
    """`smolforge train` with these arguments, in its own process, which runs the code `first` before."""
    code = f"{first}\nimport sys\nfrom smolforge.cli import main\nsys.exit(main())"
    program = ["-c", code] if first else ["-m", "smolforge"]
    return subprocess.Popen(
        [sys.executable, *program, "train", *arguments],
        env={**ENVIRONMENT, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the end; the output. Another exit code than expected fails with it."""
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{output[-3000:]}"
    return output


def start_ranks(arguments: Sequence[str], world: int, *, first: str = "") -> list[subprocess.Popen[str]]:
    """The same on several ranks, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    ranks = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
    return [start(arguments, environment, first=first) for environment in ranks]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], interval: float = 0.005) -> bool:
    """Wait for a condition while the process lives; whether it came."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(interval)
    return False


def steps_done(run: Run) -> int:
    """The last step in the run's log."""
    return max((row["step"] for row in read_json_lines(run.metrics_path)), default=0)


def is_saving(run: Run) -> bool:
    """Whether a checkpoint is half written at this moment."""
    return any(run.checkpoints_path.glob(".tmp-step-*"))


def interrupt(
    arguments: Sequence[str], run: Run, moments: Sequence[tuple[int, bool]], dice: random.Random, number: int
) -> int:
    """Start the run again and again; interrupt each time some steps on, or while it saves. How often it was."""
    times = 0
    for steps, while_saving in moments:
        process = start(arguments)
        begin = steps_done(run)
        came = wait_until(lambda: steps_done(run) >= begin + steps, process)  # noqa: B023
        if came and while_saving:
            came = wait_until(lambda: is_saving(run), process, interval=0)
        elif came:
            time.sleep(dice.random() * 0.05)
        if not came:
            finish(process)
            break
        process.send_signal(number)
        finish(process, -signal.SIGKILL if number == signal.SIGKILL else 128 + number)
        times += 1
    return times


def clone(run: Run, target: Path) -> Run:
    """A copy of a run."""
    shutil.copytree(run.path, target, symlinks=True)
    return Run(target)
