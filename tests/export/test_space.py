"""The Space: whole, started as it is, answering; and the plain model directory that it holds."""

from __future__ import annotations

import ast
import itertools
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
from smolforge.export import push
from smolforge.export.space import GRADIO, export_space, front_matter, name_of, requirements

pytest.importorskip("gradio", reason="the extra dev is not installed")


@pytest.fixture(scope="module")
def space(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_space(tiny_run, tmp_path_factory.mktemp("spaces") / "space", title='A "cat"\'s tale')


@pytest.fixture(scope="module")
def address(space: Path) -> Iterator[str]:
    """The app as the Hub starts it: its own copy of the package, its own directory, the Space's variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    environment.pop("OMP_WAIT_POLICY", None)
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                if httpx.get(f"{url}/gradio_api/info").status_code == 200:
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
    assert "{{" not in text and "smolforge[web]" in text


def test_requirements_are_those_of_the_package_and_gradio() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of pyproject.toml")
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], "gradio"]
    names = {re.split(r"[=>]", line)[0].lower().replace("_", "-") for line in requirements() if line[0].isalpha()}
    assert names == {re.split(r"[=>]", line)[0].lower().replace("_", "-") for line in wanted}
    assert f"gradio=={GRADIO}" in (root / "constraints.txt").read_text().split(), "the version that is tested here"


def test_waiting_threads_are_told_to_sleep_before_torch(space: Path) -> None:
    body = ast.parse((space / "app.py").read_text()).body
    setting = next(i for i, node in enumerate(body) if "OMP_WAIT_POLICY" in ast.unparse(node))
    ours = next(i for i, node in enumerate(body) if ast.unparse(node).startswith("from smolforge"))
    assert setting < ours
    standard = [ast.unparse(node) for node in body[:setting] if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert standard == ["import os", "import sys", "from pathlib import Path"]


def asked(address: str, *values: object) -> list[str]:
    """The events that gradio's API sends for one call of the page's function."""
    call = httpx.post(f"{address}/gradio_api/call/generate", json={"data": values}).json()
    return httpx.get(f"{address}/gradio_api/call/generate/{call['event_id']}", timeout=60).text.split("\n\n")


def test_it_has_the_seeds_function(address: str) -> None:
    endpoints = httpx.get(f"{address}/gradio_api/info").json()["named_endpoints"]
    names = [parameter["parameter_name"] for parameter in endpoints["/generate"]["parameters"]]
    assert list(endpoints) == ["/generate"] and names == ["prompt", "max_tokens", "temperature", "top_p", "top_k"]


def test_it_writes_token_by_token(address: str) -> None:
    events = asked(address, "Once upon a time", 6, 0.8, 0.9, 5)
    texts = [json.loads(event.partition("data: ")[2])[0] for event in events if event.startswith("event: generating")]
    assert len(texts) >= 2 and all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert texts[0].startswith("Once upon a time") and "event: complete" in events[-2] + events[-1]


def test_bad_input_is_an_error_not_a_crash(address: str) -> None:
    assert any("event: error" in event for event in asked(address, "", 4, 0.8, 0.9, 0))
    assert any("event: complete" in event for event in asked(address, "a cat", 4, 0.8, 0.9, 0))


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
    with pytest.raises(BadInput, match="exists already"):
        export_space(tiny_run, space)


def test_a_full_disk_leaves_nothing(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(push.shutil, "copyfile", full)
    with pytest.raises(RunFailed, match="no room on the disk"):
        push.copy_model(resolve_model(tiny_run), tmp_path / "out")
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
