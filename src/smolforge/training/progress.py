"""How fast a run is, what it shows of itself in the terminal, and a trace of a few steps."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from smolforge.formatting import size
from smolforge.logging import console

logger = logging.getLogger(__name__)

STEPS = 3  # in the trace; each takes some megabytes
WAIT = 4  # steps before, in a run that is long enough


class ProgressBar:
    """The run's progress: one live line on a terminal, a log line per logged step elsewhere. Both on stderr."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._bar: Any = None
        self._task: Any = None
        self._started = 0.0

    def start(self, step: int) -> None:
        """Show the live line where messages are shown on a terminal."""
        self._started = time.monotonic()
        if not (logger.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
            return
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            console=console(),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=self.total, completed=step, status="starting")

    def advance(self, step: int) -> None:
        """Move the live line to `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def show(self, row: dict[str, Any], seconds_per_step: float) -> None:
        """Show the row of a logged step."""
        loss = f"{row['loss']:.4f}" if math.isfinite(row["loss"]) else "not finite"
        parts = [f"loss {loss}", f"lr {row['lr']:.2e}", f"{row['tokens_per_second']:,.0f} tok/s"]
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.0%}")
        parts.append(size(row["memory_bytes"]))
        left = (self.total - row["step"]) * seconds_per_step
        times = [f"ETA {clock(left)}"] if left else []
        if self._bar:
            times.append(f"elapsed {clock(time.monotonic() - self._started)}")
            self._bar.update(self._task, completed=row["step"], status="  ".join([*parts, " · ".join(times)]))
        else:
            logger.info(f"step {row['step']:,}/{self.total:,}  {'  '.join([*parts, *times])}")

    def close(self) -> None:
        """Remove the live line."""
        if self._bar:
            self._bar.stop()
            self._bar = None


class Throughput:
    """Tokens per second over the last steps, without the first one as soon as there are others: it compiles."""

    def __init__(self, tokens_per_step: int, window: int = 20) -> None:
        self.tokens_per_step = tokens_per_step
        self._times: deque[float] = deque(maxlen=window + 1)
        self._began = time.perf_counter()

    def tick(self) -> None:
        """A step ended."""
        self._times.append(time.perf_counter())

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training, such as an evaluation."""
        self._times = deque((t + seconds for t in self._times), self._times.maxlen)

    @property
    def seconds_per_step(self) -> float:
        """Mean over the window; 0 until two steps ended."""
        steps = len(self._times) - 1
        return (self._times[-1] - self._times[0]) / steps if steps > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together, once a step ended."""
        return self.tokens_per_step / (self.seconds_per_step or self._times[-1] - self._began)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    whole = round(max(0.0, seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def build_profiler(folder: Path, first_step: int, last_step: int, device: torch.device) -> profile:
    """A trace of a few steps: what ran when, on which thread and which stream, as Chrome's trace format.

    A context manager whose `step` is called after each step; it writes FOLDER/step-N.json.gz, N the last step seen,
    which https://ui.perfetto.dev opens in the browser without uploading it. The first steps of a process are left out,
    because they compile, allocate and fill caches; so is the profiler's own first.

    Args:
        first_step: updates before this process made any.
        last_step: updates at the end of the run; a short run is traced from its beginning.
    """
    remaining = last_step - first_step
    active = max(1, min(STEPS, remaining - 1))
    warmup = 1 if remaining > active else 0
    wait = max(0, min(WAIT, remaining - active - warmup))

    def write(profiler: profile) -> None:
        path = folder / f"step-{first_step + profiler.step_num:08d}.json.gz"
        temporary = path.with_name(f".{path.name}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(temporary))
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # the run continues without its trace
            with contextlib.suppress(OSError):
                temporary.unlink()
            logger.warning(f"profile: the trace could not be written: {error}")
            return
        logger.info(f"profile: {path} ({path.stat().st_size / 1e6:.1f} MB); open it at https://ui.perfetto.dev")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a run of one step leaves no warm-up
        plan = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
    return profile(activities=activities, schedule=plan, on_trace_ready=write, profile_memory=True)
