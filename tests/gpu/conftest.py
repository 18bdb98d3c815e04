"""The rehearsal's library, compiled where there is a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
Rehearsal = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """Runs `rehearsal.py` in a process that has a fake GPU; what it saw of each wanted step."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the fake GPU needs Linux and g++ or clang++")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("the fake GPU needs a CPU build of torch")
    library = tmp_path_factory.mktemp("gpu") / "fake_cuda.so"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    (libraries,) = cpp_extension.library_paths()
    subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", *includes, str(HERE / "fake_cuda.cpp"), "-o", str(library),
         f"-L{libraries}", "-lc10", "-ltorch_cpu"], check=True, timeout=120,
    )  # fmt: skip

    def run(wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        environment = {**os.environ, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": libraries}
        command = [sys.executable, str(HERE / "rehearsal.py"), json.dumps(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run
