"""A trace of a few steps: what ran when, on which thread and which stream.

The file is Chrome's trace format, gzipped; https://ui.perfetto.dev opens it in the browser without uploading it. The
first steps of a process are left out, because they compile, allocate and fill caches; so is the profiler's own first.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

logger = logging.getLogger(__name__)

STEPS = 3  # in the trace; each takes some megabytes
WAIT = 4  # steps before, in a run that is long enough


class Profiler:
    """Traces some steps of this process. A context manager.

    Args:
        folder: where the trace goes.
        remaining: steps that this process will make; a short run is traced from its beginning.
    """

    def __init__(self, folder: Path, remaining: int, device: torch.device) -> None:
        self.folder = folder
        active = max(1, min(STEPS, remaining - 1))
        warmup = 1 if remaining > active else 0
        wait = max(0, min(WAIT, remaining - active - warmup))
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._step, self._done = 0, False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a run of one step leaves no warm-up
            plan = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write, profile_memory=True)

    def __enter__(self) -> Profiler:
        self._profile.start()
        return self

    def step(self, number: int) -> None:
        """Step `number` of the run ended."""
        if not self._done:
            self._step = number
            self._profile.step()

    def __exit__(self, *_: object) -> None:
        if not self._done:  # the run stopped within the traced steps: what was recorded is written
            self._profile.stop()

    def _write(self, profiler: profile) -> None:
        self._done = True
        path = self.folder / f"step-{self._step:08d}.json.gz"
        temporary = path.with_name(f".{path.name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(temporary))
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # the run continues without its trace
            with contextlib.suppress(OSError):
                temporary.unlink()
            logger.warning(f"profile: the trace could not be written: {error}")
            return
        logger.info(f"profile: {path} ({path.stat().st_size / 1e6:.1f} MB); open it at https://ui.perfetto.dev")
