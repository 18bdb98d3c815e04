"""Cores and memory of containers, from the files of control groups as Docker and systemd write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smolforge import limits
from smolforge.cli import run


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine of 64 CPUs whose control groups say what is given: `machine(lines of /proc/self/cgroup, files)`."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def make(groups: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(groups)
        for name, text in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(text)
        (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:   5000 kB\n")
        monkeypatch.setattr(limits, "GROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(limits, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(limits, "MOUNT", tmp_path / "fs")
        monkeypatch.setattr(limits, "visible_cpus", lambda: set(range(1000, 1064)))  # no real one, so no siblings

    return make


OLD = "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


def test_without_limits_the_machine_counts(machine) -> None:
    machine("0::/user.slice\n", {"user.slice/cpu.max": "max 100000\n", "user.slice/memory.max": "max\n"})
    assert limits.cpu_quota() is None and limits.physical_cores(1) == 64 and limits.physical_cores(4) == 16
    assert limits.available_memory() == 5000 << 10
    machine("", {})
    assert limits.cpu_quota() is None and limits.available_memory() == 5000 << 10


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        pytest.param("0::/\n", {"cpu.max": "250000 100000\n"}, id="docker"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "800000 100000\n"}, id="nested"),
        pytest.param(OLD, {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, id="version 1"),
    ],
)
def test_the_tightest_limit_of_cpus_counts(machine, groups: str, files: dict[str, str]) -> None:
    machine(groups, files)
    assert limits.cpu_quota() == 2 and limits.physical_cores(1) == 2 and limits.physical_cores(2) == 1
    assert limits.physical_cores(5) == 1, "a rank has a core at least"


def test_half_a_cpu_is_one_thread_and_no_limit_is_none(machine) -> None:
    machine("0::/\n", {"cpu.max": "50000 100000\n"})
    assert limits.cpu_quota() == 1
    machine(OLD, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n", "cpu.max": "max 100000\n"})
    assert limits.cpu_quota() is None


def test_what_the_user_says_counts_but_not_what_a_launcher_says(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("0::/\n", {"cpu.max": "800000 100000\n"})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert limits.physical_cores(1) == 3 and limits.physical_cores(2) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert limits.physical_cores(8) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert limits.physical_cores(1) == 8


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/\n", {"memory.max": "4000000\n", "memory.current": "3000000\n", "memory.stat": "anon 1\ninactive_file 5\n"}),
        (OLD, {"memory/memory.limit_in_bytes": "4000000\n", "memory/memory.usage_in_bytes": "3000000\n",
               "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 5\n"}),
    ],
    ids=["version 2", "version 1"],
)  # fmt: skip
def test_memory_of_a_container(machine, groups: str, files: dict[str, str]) -> None:
    machine(groups, files)
    assert limits.available_memory() == 1_000_005


def test_torch_starts_no_more_threads_than_a_container_has_cpus(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("0::/\n", {"cpu.max": "200000 100000\n"})
    assert run([]) == 0 and os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(limits, "physical_cores", lambda _: 1)
    assert run([]) == 0 and os.environ["OMP_NUM_THREADS"] == "1", "two hardware threads of one core"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run([]) == 0 and os.environ["OMP_NUM_THREADS"] == "5"
