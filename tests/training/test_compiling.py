"""A run compiles once, whatever it evaluates and writes in between."""

import re
import shutil
from pathlib import Path

import pytest
from launch import finish, start
from tiny import steps_of, tiny_file

from smolforge.run import Run


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler to compile with")
def test_a_run_compiles_once(tmp_path: Path) -> None:
    runs = {}
    for way in ("on", "off"):
        runs[way] = Run(tmp_path / way)
        words = [tiny_file(tmp_path), "--out", str(runs[way].path), "--set", f"training.compile={way}"]
        told = finish(start([*words, "--steps", "25"]))
        assert bool(re.search(r"compile: [1-9]\d* graphs, first step after ", told)) == (way == "on")
        assert "compiled again" not in told
    ours, theirs = ([loss for _, loss, _ in steps_of(run)] for run in (runs["on"], runs["off"]))
    assert ours == pytest.approx(theirs, abs=1e-4)
