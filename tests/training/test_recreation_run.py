"""The recreated architecture through the same doors: train, checkpoint, resume exactly, write, load."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from smolforge import cli
from smolforge.checkpoint import locate
from smolforge.model.recreation import SmollmV2Recreation
from smolforge.run import Run

# A pocket of preset seed-recreation: its architecture and the shape of its recipe.
TINY = """
model: {architecture: recreation, vocab_size: 400, hidden_size: 48, intermediate_size: 64, num_hidden_layers: 2,
        num_attention_heads: 3, num_key_value_heads: 3, rope_theta: 10000, max_position_embeddings: 64}
tokenizer: {train: {vocab_size: 400, documents: 20}}
data: {sequence_length: 64}
optimizer: {name: adamw, lr: 3.0e-4, betas: [0.9, 0.999], weight_decay: 1.0e-4}
schedule: {name: onecycle, start: 0.04, warmup: 0.2, floor: 0.01}
training: {steps: 6, micro_batch: 1, tokens_per_step: 128, precision: fp32, threads: 1}
checkpoint: {every: 3, keep: 5}
evaluation: {every: 6, tokens: 512}
samples: {every: 6, max_tokens: 8, prompts: [Once upon a time]}
logging: {every: 1, trackers: []}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("recreation")
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    assert cli.run(["train", str(folder / "tiny.yaml"), "--out", str(folder / "run")]) == 0
    return Run(folder / "run")


def losses(run: Run) -> list[float]:
    rows = [json.loads(line) for line in run.metrics_path.read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_it_trains_and_writes(finished: Run) -> None:
    assert len(losses(finished)) == 6
    (sample,) = [json.loads(line) for line in finished.samples_path.read_text(encoding="utf-8").splitlines()]
    assert sample["prompt"] == "Once upon a time" and sample["text"]


def test_its_checkpoint_loads_and_says_that_it_is_no_llama(finished: Run) -> None:
    module, tokenizer, directory = locate.load_model(finished.path)
    assert isinstance(module, SmollmV2Recreation)
    with torch.no_grad():
        assert module(torch.tensor([tokenizer.encode("Once upon a time")])).isfinite().all()
    said = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert said["model_type"] != "llama" and said["architectures"] == ["SmollmV2Recreation"]
    assert "not a Llama" in (directory / "README.md").read_text(encoding="utf-8")


def test_transformers_refuses_it(finished: Run) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="smolforge_recreation"):
        AutoModelForCausalLM.from_pretrained(locate.resolve_model(finished.path))


def test_a_run_cut_at_step_3_ends_with_the_same_bytes(finished: Run, tmp_path: Path) -> None:
    cut = Run(tmp_path / "run")
    shutil.copytree(finished.path, cut.path, symlinks=True)
    shutil.rmtree(cut.checkpoints_path / "step-00000006")
    assert cli.run(["train", "--out", str(cut.path)]) == 0
    rows = [json.loads(line) for line in cut.metrics_path.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if row.get("event") == "resume"] == [3]
    assert losses(cut) == losses(finished)
    weights = [run.checkpoints_path / "step-00000006" / "model.safetensors" for run in (cut, finished)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_fifty_more_steps_are_fifty_more(finished: Run, tmp_path: Path) -> None:
    """The seed's "further 50 steps" trained none."""
    more = Run(tmp_path / "run")
    shutil.copytree(finished.path, more.path, symlinks=True)
    before = locate.load_model(more.path)[0].state_dict()
    assert cli.run(["train", "--out", str(more.path), "--steps", "+50", "--set", "samples.every=56"]) == 0
    after = locate.load_model(more.path)
    assert after[2].name == "step-00000056" and len(losses(more)) == 56
    assert any(not torch.equal(before[name], weight) for name, weight in after[0].state_dict().items())
    assert sum(losses(more)[-10:]) < sum(losses(finished)[:6]) / 6 * 10
