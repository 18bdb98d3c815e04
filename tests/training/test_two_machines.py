"""Two network namespaces as two machines: a link that is cut for a while, and for good."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import Forked, start, start_ranks, steps_done, wait_until
from tiny import steps_of, tiny_file

from smolforge.run import Run

pytestmark = pytest.mark.slow

LIMIT = 240.0  # seconds: no try waits for longer
ENTER = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.setns(os.open("/run/netns/{name}", os.O_RDONLY), 0x40000000) == 0, os.strerror(ctypes.get_errno())
"""


class Machines:
    """Two namespaces with a link between them: 10.77.0.1, which is the first rank's, and 10.77.0.2."""

    def __init__(self) -> None:
        self.names = [f"sf{os.getpid()}{side}" for side in "ab"]
        for name in self.names:
            self.ip("netns", "add", name)
        first, second = self.names
        self.ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for number, name in enumerate(self.names, start=1):
            self.ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self.ip("-n", name, "link", "set", device, "up")

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def link(self, state: str) -> None:
        """Cut the link ("down") or mend it ("up")."""
        self.ip("-n", self.names[0], "link", "set", "eth0", state)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def train(self, words: list[str]) -> list[Forked]:
        """One rank on each."""
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
        return [
            start(words, {**shared, "RANK": str(rank), "LOCAL_RANK": "0"}, first=ENTER.format(name=name))
            for rank, name in enumerate(self.names)
        ]


@pytest.fixture
def machines() -> Iterator[Machines]:
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("two network namespaces need iproute2 and root")
    made = Machines.__new__(Machines)
    try:
        made.__init__()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield made
    made.remove()


def words_for(place: Path, name: str, *more: str) -> tuple[Run, list[str]]:
    run = Run(place / name)
    settings = [word for option in ("checkpoint.every=20", "evaluation.every=1000", "samples.every=1000", *more)
                for word in ("--set", option)]  # fmt: skip
    return run, [tiny_file(place), "--out", str(run.path), "--steps", "300", *settings]


def ends(processes: list[Forked]) -> list[tuple[int | None, str]]:
    """Exit code and output of each, within the limit."""
    outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_link_that_is_cut_for_twenty_seconds(tmp_path: Path, machines: Machines, parallel: str) -> None:
    run, words = words_for(tmp_path, "run", f"training.parallel={parallel}")
    processes = machines.train(words)
    assert wait_until(lambda: steps_done(run) >= 30, processes[0])
    machines.link("down")
    time.sleep(20)
    machines.link("up")
    assert [code for code, _ in ends(processes)] == [0, 0]
    whole, words = words_for(tmp_path, "whole", f"training.parallel={parallel}")
    assert [code for code, _ in ends(start_ranks(words, 2))] == [0, 0]
    assert steps_of(run) == steps_of(whole)


def test_a_link_that_is_cut_for_good(tmp_path: Path, machines: Machines) -> None:
    run, words = words_for(tmp_path, "run")
    processes = machines.train(words)
    assert wait_until(lambda: steps_done(run) >= 30, processes[0])
    machines.link("down")
    for code, output in ends(processes):
        assert code == 1 and "another process ended or was silent for too long" in output
        assert "Traceback" not in output
    machines.link("up")
    assert [code for code, _ in ends(machines.train(words))] == [0, 0]
    whole, words = words_for(tmp_path, "whole")
    assert [code for code, _ in ends(start_ranks(words, 2))] == [0, 0]
    assert steps_of(run) == steps_of(whole)
