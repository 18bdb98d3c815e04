"""What this process may use of its machine: cores and memory.

A container sees the whole machine, and is slowed down or ended beyond what its control group may use
(https://docs.kernel.org/admin-guide/cgroup-v2.html; files of version 1 are read too).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, MOUNT, MEMINFO = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/meminfo")


def visible_cpus() -> set[int]:
    """Numbers of the CPUs, hardware threads each, on which this process may run."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:
        return set(range(os.cpu_count() or 1))


def cpu_quota() -> int | None:
    """Whole CPUs whose time this process may use, at least one; None without a limit."""
    found = []
    for group in _groups("cpu"):
        words = _words(group / "cpu.max") or [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
        if len(words) == 2 and words[0].isdigit():
            found.append(max(1, int(words[0]) // int(words[1])))
    return min(found, default=None)


def physical_cores(world_size: int) -> int:
    """Physical cores that this process may use, divided by the ranks of this machine.

    OMP_NUM_THREADS is taken instead for a single rank. Launchers set it to 1 for each of several by themselves.
    """
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if ranks == 1 and wanted.isdigit() and int(wanted):
        return int(wanted)
    siblings = (
        (cpu, Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) for cpu in visible_cpus()
    )
    cores = len({path.read_text("ascii") if path.is_file() else str(cpu) for cpu, path in siblings})
    return max(1, min(cores, cpu_quota() or cores) // ranks)


def available_memory() -> int:
    """Bytes that processes may still take; where the system does not say, half of what the machine has."""
    machine = dict(line.split(":", 1) for line in _text(MEMINFO).splitlines()).get("MemAvailable")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([int(machine.split()[0]) << 10 if machine else pages, *_free_of_groups()])


def _free_of_groups() -> Iterator[int]:
    """Bytes that each control group with a limit may still take. Its cache of files is given back when it is needed."""
    for group in _groups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit[0].isdigit():
            stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
            cached = int(stat.get("total_inactive_file") or stat.get("inactive_file", 0))
            yield max(0, int(limit[0]) - int(used[0]) + cached)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that hold this process, the innermost first. Those that a container cannot see
    do not exist; what is mounted at the top is then its own."""
    for line in _text(GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = MOUNT / controller if controllers else MOUNT
        inner = top / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def _words(path: Path) -> list[str]:
    return _text(path).split()
