"""Freed memory that stays with the process, so that a step does not pay for the pages of the step before.

glibc returns large freed blocks to the kernel at once. Training frees and takes the same blocks every step, and each
time the kernel faults in and zeroes every page anew: 20% of a small model's step on the machine of docs/log.md.
"""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h: no block is mapped by itself, all come from the heap, which is never trimmed.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SETTINGS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}


def keep_freed_memory() -> bool:
    """Set glibc's thresholds for this process; False where the C library is another one."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in _SETTINGS.items())
