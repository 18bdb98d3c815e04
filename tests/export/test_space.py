"""The Space: whole, started as it is, answering; and the plain model directory that it holds."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from smolforge import cli
from smolforge.checkpoint.locate import load_model, resolve_model
from smolforge.errors import BadInput, RunFailed
from smolforge.export import plain
from smolforge.export.space import export_space, front_matter, name_of, requirements

pytest.importorskip("gradio", reason="the extra web is not installed")


@pytest.fixture(scope="module")
def space(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_space(tiny_run, tmp_path_factory.mktemp("spaces") / "space", title='A "cat"\'s tale')


@pytest.fixture(scope="module")
def address(space: Path) -> Iterator[str]:
    """The Space as the Hub starts it: its own copy of the package, its own directory, the Space's variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "SPACE_ID": "me/cat", "SPACE_HOST": "me-cat.hf.space", "GRADIO_SERVER_PORT": str(port),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    environment.pop("OMP_WAIT_POLICY", None)
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def test_front_matter_is_what_the_hub_reads(space: Path) -> None:
    text = (space / "README.md").read_text()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.DOTALL)[1])  # type: ignore[index]
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", front["sdk_version"])
    assert front["title"] == 'A "cat"\'s tale'
    assert len(front["short_description"]) <= 60  # the Hub's limit
    assert "license" not in front, "the card names none"
    assert "{{" not in text


def test_requirements_are_those_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of pyproject.toml")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["web"]]
    names = {re.split(r"[=>]", line)[0].lower().replace("_", "-") for line in requirements() if line[0].isalpha()}
    assert names == {re.split(r"[=>]", line)[0].lower().replace("_", "-") for line in wanted}


def test_waiting_threads_are_told_to_sleep_before_torch(space: Path) -> None:
    body = ast.parse((space / "app.py").read_text()).body
    setting = next(i for i, node in enumerate(body) if "OMP_WAIT_POLICY" in ast.unparse(node))
    ours = next(i for i, node in enumerate(body) if ast.unparse(node).startswith("from smolforge"))
    assert setting < ours
    standard = [ast.unparse(node) for node in body[:setting] if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert standard == ["import os", "import sys", "from pathlib import Path"]


def test_it_answers_with_its_own_copy(space: Path, address: str) -> None:
    asked = {"model": "x", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    asked["model"] = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
    assert asked["model"] == 'A "cat"\'s tale'
    answer = httpx.post(f"{address}/v1/completions", json=asked, headers={"Origin": "https://me-cat.hf.space"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4
    foreign = httpx.post(f"{address}/v1/completions", json=asked, headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403


def test_the_hub_may_show_it_in_a_frame(address: str) -> None:
    headers = httpx.get(f"{address}/").headers
    assert "x-frame-options" not in headers
    policy = headers["content-security-policy"]
    assert "frame-ancestors 'self' https://huggingface.co https://*.hf.space;" in policy


def test_the_model_goes_without_training_state(space: Path, tiny_run: Path) -> None:
    newest = tiny_run / "checkpoints" / "last"
    assert not (space / "model" / "training").exists() and not (space / "model" / "manifest.json").exists()
    assert (space / "model" / "model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()
    assert load_model(space / "model")[1].vocab_size == load_model(newest)[1].vocab_size
    assert not list(space.rglob("__pycache__"))


def test_a_directory_in_use_is_refused_and_kept(space: Path, tiny_run: Path) -> None:
    before = sorted(path.name for path in space.parent.iterdir())
    for goal in ("space", "checkpoint"):
        assert cli.run(["export", str(tiny_run), "--to", goal, "--out", str(space)]) == 2
    assert sorted(path.name for path in space.parent.iterdir()) == before
    with pytest.raises(BadInput, match="is there already"):
        export_space(tiny_run, space)


def test_a_full_disk_leaves_nothing(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plain.shutil, "copyfile", full)
    with pytest.raises(RunFailed, match="no room on the disk"):
        plain.copy_model(resolve_model(tiny_run), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_plain_checkpoint(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "plain"
    assert cli.run(["export", str(tiny_run), "--to", "checkpoint", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"to": "checkpoint", "path": str(out)}
    assert resolve_model(out) == out
    assert oct(out.stat().st_mode & 0o777) == "0o755"


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--to", "space", "--quantize", "f16"], "--quantize"),
        (["--to", "gguf", "--dry-run"], "--dry-run"),
        (["--to", "checkpoint", "--private"], "--private"),
    ],
)
def test_an_option_of_another_goal(
    tiny_run: Path, tmp_path: Path, words: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["export", str(tiny_run), *words, "--out", str(tmp_path / "x")]) == 2
    assert field in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_names(tiny_run: Path) -> None:
    assert name_of(tiny_run) == "cat"
    assert name_of(tiny_run / "checkpoints" / "last") == "cat step-00000003"
    assert name_of("HuggingFaceTB/SmolLM2-135M@main") == "SmolLM2-135M"
    (tiny_run.parent / "card").mkdir(exist_ok=True)
    (tiny_run.parent / "card" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\n")
    assert "license: apache-2.0" in front_matter("x", tiny_run.parent / "card")
