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


def build_profiler(folder: Path, first_step: int, last_step: int, device: torch.device) -> profile:
    """A context manager whose `step` is called after each step; it writes FOLDER/step-N.json.gz, N the last step seen.

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
