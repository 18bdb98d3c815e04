"""The genuine SmolLM2-135M is tuned on a CPU within 4 GB, and by an adapter within 2 GB, checkpoint included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peak_memory import STATUS
from smolforge.tales.source import write

TESTS = Path(__file__).parents[1]
PROGRAM = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from peak_memory import peak_memory
from smolforge.cli import run
code = run(sys.argv[1:])
print(peak_memory())
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="there is no /proc/self/status")
@pytest.mark.parametrize(("more", "limit"), [((), 4e9), (("--lora", "16"), 2e9)], ids=["every weight", "adapter"])
def test_peak_memory_of_tuning(more: tuple[str, ...], limit: float, smollm2: Path, tmp_path: Path) -> None:
    write(str(tmp_path / "dialogues.jsonl"), kind="jsonl", documents=range(60), chat=True)
    words = ["finetune", str(smollm2), "--data", str(tmp_path / "dialogues.jsonl"), "--out", str(tmp_path / "run")]
    settings = ["training.steps=1", "data.holdout=0", "logging.trackers=[]", "training.compile=off"]
    command = [sys.executable, "-c", PROGRAM, *words, *more, *(f"--set={setting}" for setting in settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = int(done.stdout.split()[-1])
    assert peak <= limit, f"{peak / 1e9:.2f} GB"
    print(f"peak: {peak / 1e9:.2f} GB")
