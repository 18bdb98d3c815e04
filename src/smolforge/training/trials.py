"""The trials of a sweep: ordinary runs, each in a process of its own (`python -m smolforge.training.trials REQUEST`).

When the sweep that started it ends, however that happens, the standard input of a trial closes: it then saves and ends.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolforge.devices import choose_device
from smolforge.errors import RunLocked, SmolforgeError
from smolforge.formatting import duration
from smolforge.logging import console, show
from smolforge.metrics_log import read_metrics
from smolforge.run import Run

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LOCKED_SECONDS = 120.0  # until the trial of a sweep that was killed has saved and ended


class Trial:
    """One run of a sweep.

    Args:
        folder: of the sweep.
        request: the fields of a `TrainRequest`, JSON-able, but for `out`.
        metric: of the held-out scores, what counts.
    """

    def __init__(self, folder: Path, name: str, request: dict[str, Any], metric: str) -> None:
        self.name, self.metric = name, metric
        self.run, self.log = Run(folder / "trials" / name), folder / "logs" / f"{name}.log"
        self.request = {**request, "out": str(self.run.path)}
        self.error: str | None = None

    def steps(self) -> int:
        """Steps that are logged."""
        return max((row["step"] for row in read_metrics(self.run)), default=0)

    def score(self, until: int) -> float | None:
        """The lowest held-out value up to a step, of the weights or of their average; None before it was reached."""
        rows = [row for row in read_metrics(self.run) if row["step"] <= until]
        ended = any((row["step"] == until and "validation" in row) or row.get("event") == "ended" for row in rows)
        scores = [row[kind].get(self.metric) for row in rows for kind in ("validation", "average") if kind in row]
        return min((score for score in scores if score is not None), default=None) if ended else None

    def start(self, until: int, threads: int, place: int) -> subprocess.Popen[bytes]:
        """Train up to a step, on the GPU number `place` where there are some."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.run.path.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if choose_device().type == "cuda":
            environment["SMOLFORGE_DEVICE"] = f"cuda:{place}"
        request = json.dumps({**self.request, "until": until, "overrides": [f"training.threads={threads}"]})
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches the sweep, and the trial hears of it once.
            return subprocess.Popen(
                [sys.executable, "-m", "smolforge.training.trials", request],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=environment,
            )  # fmt: skip

    def finish(self, until: int, code: int, seconds: float) -> None:
        """Tell the score of a trial whose process ended, or keep and tell why it has none."""
        score = self.score(until)
        if code == 0 and score is not None:
            logger.info(
                f"{self.name}: {score:.4f} {self.metric.replace('_', ' ')}, step {until:,}, {duration(seconds)}"
            )
            return
        lines = self.log.read_text(errors="replace").strip().splitlines()
        first = next((i for i, line in enumerate(lines) if line.startswith("error: ")), len(lines) - 1)
        found = " ".join(" ".join(lines[max(first, 0) :]).removeprefix("error: ").split())[:500]
        self.error = found if code >= 0 and found else f"the process ended with code {code}"
        logger.error(f"{self.name} failed: {self.error} ({self.log})")


def train_all(goals: Mapping[Trial, int], jobs: int, threads: int) -> None:
    """Train each trial up to its step, `jobs` at a time; one that fails keeps its error, and the others go on."""
    waiting = deque(trial for trial, until in goals.items() if trial.score(until) is None)
    running: dict[Trial, tuple[subprocess.Popen[bytes], int, float]] = {}
    with _progress(goals, list(waiting)) as shown:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    place = min(set(range(jobs)) - {place for _, place, _ in running.values()})
                    trial = waiting.popleft()
                    running[trial] = trial.start(goals[trial], threads, place), place, time.monotonic()
                time.sleep(POLL_SECONDS)
                for trial, (process, _, began) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[trial]
                        trial.finish(goals[trial], code, time.monotonic() - began)
                shown(list(running))
        finally:
            for process, *_ in running.values():
                assert process.stdin is not None
                process.stdin.close()
            for process, *_ in running.values():
                process.wait()


@contextmanager
def _progress(goals: Mapping[Trial, int], waiting: list[Trial]) -> Iterator[Callable[[list[Trial]], None]]:
    """Shows the trials that run: on a terminal a line for all steps and one for each of them, nothing elsewhere."""
    if not (logger.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        yield lambda running: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    steps = TextColumn("{task.completed:,}/{task.total:,}")
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), steps, TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True) as bar:
        whole = bar.add_task("all trials", total=sum(goals.values()))
        lines: dict[Trial, Any] = {}
        left = set(waiting)

        def shown(running: list[Trial]) -> None:
            for trial in set(lines) - set(running):
                bar.remove_task(lines.pop(trial))
                left.discard(trial)
            for trial in running:
                if trial not in lines:
                    lines[trial] = bar.add_task(trial.name[:60], total=goals[trial])
                bar.update(lines[trial], completed=trial.steps())
            ended = sum(until for trial, until in goals.items() if trial not in left)
            bar.update(whole, completed=ended + sum(trial.steps() for trial in running))

        yield shown


def main() -> int:
    """Train one trial; the exit code."""
    from smolforge.training.setup import TrainRequest
    from smolforge.training.train import run_training

    show()
    wanted = json.loads(sys.argv[1])
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    deadline = time.monotonic() + LOCKED_SECONDS
    while True:
        try:
            return run_training(TrainRequest(**{**wanted, "out": Path(wanted["out"])}))[1].exit_code
        except SmolforgeError as error:
            if not isinstance(error, RunLocked) or time.monotonic() > deadline:
                print(f"error: {error}", file=sys.stderr)
                return error.exit_code
            time.sleep(0.5)


def _end_with_the_sweep() -> None:
    os.read(0, 1)  # not of sys.stdin, whose lock this thread would hold when Python ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
