"""A server with a draft model gives the answers of one without; a draft that does not fit ends it at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from serving_fixtures import serving
from smolforge.checkpoint.format import write_model
from smolforge.checkpoint.locate import load_model
from smolforge.generation import Engine, SamplingParams
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer

BODY = {"prompt": "Once upon a time", "seed": 7, "max_tokens": 60, "temperature": 0.8, "top_p": 0.9}


def test_a_server_with_a_draft_gives_the_same_answers(tiny_run):
    alone = Engine.from_pretrained(tiny_run)
    if alone.speculation is None:
        pytest.skip("no native step here")
    expected = "".join(step.text for step in alone.stream(["Once upon a time"], SamplingParams(seed=7, max_tokens=60)))
    with serving(tiny_run, "--draft", str(tiny_run / "checkpoints" / "step-00000015"), "--no-page") as server:
        assert server.post("/v1/completions", BODY).json()["choices"][0]["text"] == expected
        assert any("draft: " in line and "step-00000015" in line for line in server.log)
        assert server.idle()


def test_a_draft_that_does_not_fit_ends_the_server(tiny_run, tmp_path):
    module, _, _ = load_model(tiny_run)
    write_model(
        tmp_path,
        module.config,
        build_model(module.config, seed=0).state_dict(),
        Tokenizer.train(["other"] * 9, 300),
        card="",
    )
    command = [sys.executable, "-m", "smolforge", "serve", str(tiny_run), "--port", "0", "--no-page"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--draft", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "error: --draft: its tokenizer is not the model's" in done.stderr and "Traceback" not in done.stderr
