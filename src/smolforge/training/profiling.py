"""A trace of a few steps: what ran when, on which thread and which stream.

The file is Chrome's trace format, gzipped, which https://ui.perfetto.dev opens (drag it in; nothing is uploaded).
The first steps of a process are left out, for they compile, allocate and fill caches; so is the profiler's own first.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FOLDER = "profile"
STEPS = 3  # that the trace holds; each is some megabytes
WAIT = 4  # steps before, in a run that is long enough


class Profiler:
    """Watches the steps of one process; does nothing where it was not asked for.

    Args:
        folder: the run's directory; the trace goes to its folder `profile`.
        remaining: steps that this process will make; a short run is watched from its beginning.
        device: what the model is on.
    """

    def __init__(self, folder: Path, remaining: int, device: torch.device, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder / FOLDER, say
        active = max(1, min(STEPS, remaining - 1))
        warmup = 1 if remaining > active else 0
        wait = max(0, min(WAIT, remaining - active - warmup))
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.step_number, self.done = 0, False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a run of one step leaves no room to warm up
            plan = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
        self._profile = profile(
            activities=activities,
            schedule=plan,
            on_trace_ready=self._write,
            profile_memory=True,
        )

    def start(self) -> None:
        """Begin with the first step of this process."""
        self._profile.start()

    def step(self, number: int) -> None:
        """Step `number` of the run is over."""
        if not self.done:
            self.step_number = number
            self._profile.step()

    def close(self) -> None:
        """End; what was seen so far is written where the run stopped in the middle."""
        if not self.done:
            self._profile.stop()

    def _write(self, profiler: profile) -> None:
        self.done = True
        path = self.folder / f"step-{self.step_number:08d}.json.gz"
        temporary = path.with_name(f".{path.name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(temporary))
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # a trace is no reason to lose a run
            with contextlib.suppress(OSError):
                temporary.unlink()
            self.say(f"profile: the trace could not be written: {error}")
            return
        self.say(f"profile: {path} ({path.stat().st_size / 1e6:.1f} MB); open it at https://ui.perfetto.dev")
