"""The peak memory of this process, on Linux.

`resource.getrusage` does not serve: after exec its peak is at least that of the process that forked, here pytest.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """Largest resident memory so far, in bytes."""
    if not STATUS.exists():
        pytest.skip("there is no /proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found
    return 1024 * int(found[1])


def reset_peak() -> int:
    """Count the peak anew from the memory in use, and return it."""
    if CLEAR.exists():
        CLEAR.write_text("5")
    return peak_memory()
