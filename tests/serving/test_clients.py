"""Clients of other people, as their documentation uses them, against a real server.

They live in a virtual environment of their own, so that their dependencies cannot change ours: `make soak` makes
`.venv-clients` from `clients/requirements.txt` and `clients/package.json`; SMOLFORGE_CLIENTS names another folder. Each
script of `clients/` is one client, and its last line is the result.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from browser.conftest import chromium
from serving_fixtures import serving

pytest.importorskip("llguidance", reason="the extra web is not installed")
pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).with_name("clients")
CLIENTS = Path(os.environ.get("SMOLFORGE_CLIENTS", Path(__file__).parents[2] / ".venv-clients"))
PYTHON = CLIENTS / "bin" / "python"
# The module that each script imports.
MODULES = {
    "use_openai.py": "openai", "use_litellm.py": "litellm", "use_llm.py": "llm", "use_langchain.py": "langchain_openai",
    "use_instructor.py": "instructor", "use_pydantic_ai.py": "pydantic_ai",
}  # fmt: skip
__all__ = ["chromium"]  # a fixture
PACKAGES = {"use_openai.mjs": "openai", "use_ai_sdk.mjs": "ai"}


def run(*command: object, folder: Path = SCRIPTS) -> str:
    """The last line that a client writes; its own words where it fails."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OPENAI_API_KEY")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip().splitlines()[-1]


def need_module(name: str) -> None:
    if not PYTHON.is_file():
        pytest.skip(f"there is no {PYTHON}: make soak installs the clients")
    if subprocess.run([str(PYTHON), "-c", f"import {name}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{name} is not installed in {CLIENTS}")


@pytest.fixture(scope="module", params=["tiny", "SmolLM2-135M-Instruct"])
def place(request):
    """A server's address, its model's name and directory."""
    model = request.getfixturevalue("chat_model" if request.param == "tiny" else "smollm2")
    with serving(model, "--max-per-client", "64") as server:
        name = server.get("/v1/models").json()["data"][0]["id"]
        yield f"{server.url}/v1", name, model


@pytest.mark.parametrize("script", MODULES)
def test_a_python_client_works(place, script: str) -> None:
    need_module(MODULES[script])
    assert run(PYTHON, script, *place[:2]) == "ok"


@pytest.mark.parametrize("script", PACKAGES)
def test_a_javascript_client_works(place, script: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (CLIENTS / "node_modules" / PACKAGES[script]).is_dir():
        pytest.skip(f"{PACKAGES[script]} is not installed in {CLIENTS}/node_modules")
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")  # node looks beside the script
    shutil.copy(SCRIPTS / script, tmp_path)
    assert run(node, script, *place[:2], folder=tmp_path) == "ok"


# What node finds by itself, a page is told.
PAGE = """<!doctype html><script type="importmap">{"imports": {
  "node:assert": "/assert.mjs", "openai": "/node_modules/openai/index.mjs",
  "openai/helpers/zod": "/node_modules/openai/helpers/zod.mjs", "zod": "/node_modules/zod/index.js",
  "zod/v3": "/node_modules/zod/v3/index.js", "zod/v4": "/node_modules/zod/v4/index.js"}}</script>
<script>globalThis.place = %s;</script>
<script type="module" src="/use_openai.mjs"></script>"""
ASSERT = """
const ok = (value) => { if (!value) throw new Error("not so"); };
export default { ok, equal: (one, other) => ok(one === other) };
"""


class Files(http.server.SimpleHTTPRequestHandler):
    """The files of a web page."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_the_javascript_client_works_in_a_browser(chat_model, chromium, tmp_path: Path) -> None:
    """From a page of an origin that may call the API; one of another origin may not."""
    if not (CLIENTS / "node_modules" / "openai").is_dir():
        pytest.skip(f"openai is not installed in {CLIENTS}/node_modules")
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    (tmp_path / "assert.mjs").write_text(ASSERT)
    shutil.copy(SCRIPTS / "use_openai.mjs", tmp_path)
    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=str(tmp_path)))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    port, context = files.server_port, chromium.new_context()
    try:
        with serving(chat_model, "--cors-origin", f"http://127.0.0.1:{port}") as server:
            (tmp_path / "index.html").write_text(PAGE % json.dumps([f"{server.url}/v1", "tiny-chat"]))
            for host, end in (("127.0.0.1", "ok"), ("localhost", "Connection error.")):
                page, said = context.new_page(), []
                page.on("console", lambda line, said=said: said.append(line.text) if line.type == "log" else None)
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.goto(f"http://{host}:{port}/index.html")
                for _ in range(1200):
                    if said:
                        break
                    page.wait_for_timeout(100)
                assert said == [end], host
    finally:
        files.shutdown()
        context.close()


TASKS = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}{{choices[0]}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
ROWS = [
    {"question": "Once upon a time there was", "choices": [" a little fox", " xqz 17"], "label": 0},
    {"question": "The bear lived in a", "choices": [" qqq", " cave"], "label": 1},
    {"question": "naïve owl ✨", "choices": [" ✨", " the"], "label": 0},
]


def test_lm_eval_scores_a_server_as_it_scores_the_checkpoint(chat_model, tmp_path: Path, monkeypatch) -> None:
    need_module("lm_eval, transformers, tenacity")
    evaluation = pytest.importorskip("smolforge.evaluation.tasks", reason="the extra eval is not installed")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    with serving(chat_model, "--quantize", "fp32", "--max-per-client", "64") as server:
        words = (f"{server.url}/v1", "tiny-chat", chat_model, tmp_path)
        served = json.loads(run(PYTHON, "use_lm_eval.py", *words))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = evaluation.run_tasks(chat_model, list(TASKS), task_files=tmp_path)
    assert served["local-chat-completions"].keys() == {"written"}
    for task, metrics in served["local-completions"].items():
        for metric, value in metrics.items():
            assert value == pytest.approx(loaded[task][metric], rel=1e-4), (task, metric)
