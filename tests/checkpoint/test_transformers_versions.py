"""transformers 4.57 and 5 both load a checkpoint, and both compute our logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from smolforge.checkpoint.format import write_model
from smolforge.model.architecture import build_model

pytestmark = pytest.mark.slow
# What a version of transformers says of directories; JSON keeps every bit of a float.
PROBE = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
answers = []
for directory in sys.argv[2:]:
    model, told = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(sys.argv[1])["input_ids"]
    prompt = torch.tensor([ids])
    with torch.no_grad():
        logits = model(prompt).logits[0].float()
    written = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    new = getattr(model.config, "rope_parameters", None)
    answers.append({
        "version": transformers.__version__, "dtype": str(model.dtype), "eos": tokenizer.eos_token, "ids": ids,
        "theta": new["rope_theta"] if new else model.config.rope_theta, "logits": logits.tolist(),
        "written": written[0].tolist(), "told": {name: sorted(map(str, found)) for name, found in told.items()},
    })
print(json.dumps(answers))
"""
TEXT = "the cat sat on 2024 mats <|endoftext|> é 🙂"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57 and what it needs, to come before the environment's own; torch is shared."""
    folder = tmp_path_factory.mktemp("old") / "packages"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "transformers==4.57.*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


def ask(directories: list[Path], packages: Path | None) -> list[dict[str, Any]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"PYTHONPATH": str(packages)} if packages else {})}
    words = [sys.executable, "-c", PROBE, TEXT, *map(str, directories)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_both_load_it_with_equal_logits(tiny: Any, tmp_path: Path, old: Path) -> None:
    models = []
    for tied in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            # Neither value is a default of the library: one that is not read shows in the logits.
            changes = {"tie_word_embeddings": tied, "rope_theta": 5000.0, "rms_norm_eps": 1e-3}
            config = tiny.config.model_copy(update=changes)
            models.append((build_model(config, seed=3, dtype=dtype), tmp_path / f"{tied}-{dtype}"))
            write_model(models[-1][1], config, models[-1][0].state_dict(), tiny.tokenizer)
    directories = [directory for _, directory in models]
    for (module, _), four, five in zip(models, ask(directories, old), ask(directories, None), strict=True):
        assert four["version"].startswith("4.57.") and five["version"].startswith("5.")
        dtype = next(module.parameters()).dtype
        for said in (four, five):
            assert said["dtype"] == str(dtype) and said["theta"] == 5000.0 and said["eos"] == "<|endoftext|>"
            assert not any(said["told"].values()), said["told"]
            assert said["ids"] == tiny.tokenizer.encode_with_special_tokens(TEXT)
        assert four["logits"] == five["logits"] and four["written"] == five["written"]
        with torch.no_grad():
            ours = module(torch.tensor([four["ids"]]))[0].float()
        assert (ours - torch.tensor(four["logits"])).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
