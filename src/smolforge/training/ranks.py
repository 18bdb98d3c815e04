"""What the processes of a run must have in common: the directory, the version and the configuration."""

from __future__ import annotations

import time

from smolforge import __version__
from smolforge.config import RunConfig
from smolforge.distributed import DistributedContext
from smolforge.errors import BadInput
from smolforge.run import Run, lock_holder

SHARED_SECONDS = 20.0  # until a file is seen on the other machines of a network filesystem


def check_ranks(run: Run, config: RunConfig, ranks: DistributedContext) -> None:
    """Raise BadInput on all ranks where one sees another directory, or has another version or configuration."""
    holder = ranks.broadcast(lock_holder(run) if ranks.is_main else None)
    deadline = time.monotonic() + SHARED_SECONDS
    while not (same := lock_holder(run) == holder) and time.monotonic() < deadline:
        time.sleep(0.5)
    found = ranks.all_gather((same, __version__, config.to_yaml()))
    for rank, (same, installed, text) in enumerate(found):
        if not same:
            raise BadInput(
                f"process {rank} does not see the directory {run.path} of process 0",
                field="out",
                hint="All machines of a run need one shared folder: give its path with --out.",
            )
        if installed != found[0][1]:
            raise BadInput(f"process {rank} runs smolforge {installed}, and process 0 runs {found[0][1]}")
        if text != found[0][2]:
            pairs = zip(found[0][2].splitlines(), text.splitlines(), strict=False)
            first, other = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
            raise BadInput(f"process {rank} has another configuration than process 0: {other!r}, not {first!r}")
