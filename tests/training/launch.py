"""Runs of smolforge as processes of their own, to be killed, signalled and starved."""

import functools
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smolforge.files import read_json_lines
from smolforge.run import Run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
PATIENCE = 120.0  # seconds until a process that should have ended is a failure


# Importing takes three quarters of the time of a tiny run. A process that has imported everything is forked for each.
FORKER = """
import json, os, sys
import torch._dynamo, torch.distributed.fsdp, smolforge.training.train
from smolforge.cli import main
for line in sys.stdin:
    wanted = json.loads(line)
    if "pid" in wanted:
        pid, status = os.waitpid(wanted["pid"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT)
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(file, number)
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv = ["smolforge", *wanted["arguments"]]
    exec(wanted["first"], {})
    sys.exit(main())
"""


@functools.cache
def _forker() -> tuple[subprocess.Popen[str], Path]:
    """The process that forks, which ends with this one, and a folder for what its children print."""
    command = [sys.executable, "-c", FORKER]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, Path(tempfile.mkdtemp(prefix="smolforge-forked-"))


def _ask(**wanted: Any) -> Any:
    process, _ = _forker()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(wanted) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


_numbers = itertools.count()


class Forked:
    """A process of `_forker`, as `subprocess.Popen` has it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], first: str) -> None:
        self._log, self.returncode = _forker()[1] / f"{next(_numbers)}.log", None
        self.pid: int = _ask(
            log=str(self._log),
            folder=str(Path.cwd()),
            environment=dict(environment),
            arguments=list(arguments),
            first=first,
        )

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(pid=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout or 0)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._log.read_text(errors="replace") if self._log.exists() else "", None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = Forked | subprocess.Popen[str]


def start(arguments: Sequence[str], environment: Mapping[str, str] | None = None, *, first: str = "") -> Forked:
    """`smolforge train` with these arguments, in a process of its own, which runs the code `first` before."""
    return Forked(["train", *arguments], {**ENVIRONMENT, **(environment or {})}, first)


def start_new(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """As `start`, from the beginning: with its own imports, hashes of texts and pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "smolforge", "train", *arguments],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: Process, code: int = 0) -> str:
    """Wait for the end; the output. Another exit code than expected fails with it."""
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{output[-3000:]}"
    return output


def start_ranks(arguments: Sequence[str], world: int, *, first: str = "") -> list[Forked]:
    """The same on several ranks, as torchrun would start them."""
    return [start(arguments, environment, first=first) for environment in ranks_of(world)]


def ranks_of(world: int) -> list[dict[str, str]]:
    """What a launcher sets for each of several ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    return [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, in their order."""
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in listed.stdout.split()]


def wait_until(condition: Callable[[], bool], process: Process, interval: float = 0.005) -> bool:
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
