"""`benchmarks/gpu/first_day.py`: rehearsed on a CPU, part by part; a part that fails or hangs stops nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "first_day.py"
sys.path.insert(0, str(SCRIPT.parent))

import first_day  # noqa: E402


def command(*arguments: str, blocked: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "src"), *([str(blocked)] if blocked else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=1500)


def test_one_part_small(tmp_path: Path) -> None:
    done = command("--rehearse", "--out", str(tmp_path), "--only", "kernels")
    assert done.returncode == 0, done.stdout + (tmp_path / "kernels.log").read_text()
    found = json.loads((tmp_path / "first_day.json").read_text())
    assert all(row["passed"] == "yes" for row in found["kernels"]["rows"]) and len(found["kernels"]["rows"]) > 8
    assert "attention varlen, packed documents" in (tmp_path / "first_day.md").read_text()


def test_a_part_that_fails_or_hangs_leaves_what_was_measured(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "parts.py").write_text(
        "import json, sys, time\n"
        "name, target = sys.argv[1:3]\n"
        "open(target, 'w').write(json.dumps({'title': name, 'rows': [{'tokens/s': 12345.6}]}))\n"
        "if name == 'speed': time.sleep(60)\n"
        "if name == 'kernels': raise RuntimeError('illegal memory access')\n"
    )
    monkeypatch.setattr(first_day, "HERE", tmp_path)
    monkeypatch.setattr(first_day, "LIMITS", {"kernels": 20, "speed": 3, "memory": 20})
    monkeypatch.setattr(sys, "argv", ["first_day.py", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert first_day.main() == 1
    found = json.loads((tmp_path / "out" / "first_day.json").read_text())
    assert "illegal memory access" in found["kernels"]["failure"] and found["speed"]["failure"] == "cut after 3 s"
    assert found["memory"]["failure"] is None
    text = (tmp_path / "out" / "first_day.md").read_text()
    assert text.count("| 12,346 |") == 3, "the rows before the failure are in the table"


def test_wheels_that_a_bare_machine_lacks(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "rich-14.0-py3-none-any.whl").touch()
    version = first_day.importlib.metadata.version

    def installed(name: str) -> str:
        if name in ("rich", "tokenizers", "transformers"):
            raise first_day.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(first_day.importlib.metadata, "version", installed)
    assert first_day.wheels(tmp_path) == 1
    shown = capsys.readouterr().out
    assert f"pip install --no-index --find-links {tmp_path} tokenizers rich" in shown
    assert f"{tmp_path} lacks tokenizers" in shown and "missing (optional), no wheel" in shown


BARE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"pyarrow", "huggingface_hub", "httpx", "tensorboard", "gguf", "transformers", "pytest"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.slow
def test_the_whole_rehearsal_on_a_bare_machine(tmp_path: Path) -> None:
    """Without what the package needs beyond torch, numpy, safetensors, tokenizers, pydantic, PyYAML and rich."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    done = command("--rehearse", "--out", str(tmp_path / "out"), blocked=tmp_path)
    logs = "".join(path.read_text()[-1500:] for path in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    found = json.loads((tmp_path / "out" / "first_day.json").read_text())
    assert list(found) == list(first_day.LIMITS) and not any(part["failure"] for part in found.values())
    assert sum(first_day.LIMITS.values()) < 10 * 60
    assert all(row["bitwise"] == "True" for row in found["resume"]["rows"])
