"""--init: pretraining goes on from any Llama directory or Hub id, and what smolforge does not have is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import TINY, tiny_file

from faults.server import FaultServer, as_hub
from smolforge import cli
from smolforge.checkpoint import locate
from smolforge.metrics_log import read_metrics
from smolforge.run import Run
from smolforge.tokenizer import TOKENIZER_FILES, Tokenizer

# Steps that change nothing: what is saved is what was loaded.
STILL = ["--steps", "1", "--set", "optimizer.lr=1e-30", "--set", "evaluation.tokens=500"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers writes it: bf16, in shards, untied, with another shape than the configuration's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("theirs") / "model"
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=304, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=500.0, rms_norm_eps=1e-4,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="50KB")
    Tokenizer.train(["the cat sat on the mat and saw the other cat, once upon a time " * 20], 300).save(directory)
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def train(folder: Path, init: Path | str, *words: str) -> Run:
    assert cli.run(["train", tiny_file(folder), "--init", str(init), "--out", str(folder / "run"), *words]) == 0
    return Run(folder / "run")


def assert_same_model(run: Run, directory: Path) -> None:
    """The run's checkpoint and the directory have one shape, one tokenizer, and equal weights and logits."""
    from transformers import AutoModelForCausalLM

    ours, tokenizer, _ = locate.load_model(run.path)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    state = expected.state_dict()
    assert {name: tuple(t.shape) for name, t in ours.state_dict().items()} == {
        n: tuple(t.shape) for n, t in state.items()
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert tokenizer.encode("the other cat") == Tokenizer.from_pretrained(directory).encode("the other cat")
    ids = torch.tensor([tokenizer.encode("the cat sat on the mat")])
    with torch.no_grad():
        assert (ours(ids) - expected(ids).logits).abs().max() < 1e-5


def test_from_shards_in_bf16(theirs: Path, tmp_path: Path) -> None:
    run = train(tmp_path, theirs, *STILL)
    assert_same_model(run, theirs)
    assert "pretrained from the weights of" in (run.checkpoints_path / "last" / "README.md").read_text()
    typed = json.loads((run.path / "environment.json").read_text())["command"]
    assert typed.startswith("smolforge train ") and f"--init {theirs}" in typed


def test_from_one_file_in_fp32_whatever_the_preset_says_of_shape_and_tokenizer(theirs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole, strange = tmp_path / "whole", tmp_path / "strange"
    AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).save_pretrained(whole)
    for file in TOKENIZER_FILES:
        if (theirs / file).exists():
            shutil.copy(theirs / file, whole)
    Tokenizer.train(["another tokenizer, whose ids mean nothing to these weights " * 9], 280).save(strange)
    assert (whole / "model.safetensors").exists()
    base = tmp_path / "strange.yaml"
    base.write_text(yaml.safe_dump({**TINY, "tokenizer": str(strange)}))
    words = ["train", str(base), "--init", str(whole), "--out", str(tmp_path / "run"), *STILL]
    assert cli.run(words) == 0
    assert_same_model(Run(tmp_path / "run"), whole)


@pytest.mark.parametrize(
    "override", ["model.num_hidden_layers=7", "model={hidden_size: 64}", "tokenizer=/nonexistent",
                 "tokenizer.train.vocab_size=300"]
)  # fmt: skip
def test_what_contradicts_the_model_is_refused(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    words = ["train", tiny_file(tmp_path), "--init", str(theirs), "--out", str(tmp_path / "run"), "--set", override]
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and f"{theirs} has " in error and override.split("=")[0].split(".")[0] in error
    assert not (tmp_path / "run").exists()


def test_what_agrees_with_the_model_is_accepted(theirs: Path, tmp_path: Path) -> None:
    agreeing = ["model.num_hidden_layers=3", "model.rope_theta=500", f"tokenizer={theirs}"]
    train(tmp_path, theirs, *STILL, *(word for override in agreeing for word in ("--set", override)))


def test_it_learns_from_there_and_resumes_when_the_model_is_gone(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(theirs, model)
    run = train(tmp_path, model, "--steps", "5")
    assert "weights and tokenizer: from model\n" in capsys.readouterr().err
    shutil.rmtree(model)
    assert cli.run(["train", "--out", str(run.path), "--steps", "+5"]) == 0
    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.1
    assert all(torch.isfinite(tensor).all() for tensor in locate.load_model(run.path)[0].state_dict().values())


def test_from_a_hub_id(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the real client: the weights in shards, the tokenizer, no pickle and nothing else."""
    files = {path.name: path.read_bytes() for path in theirs.iterdir()}
    with FaultServer() as hub:
        as_hub(hub, monkeypatch, tmp_path / "hf")
        hub.push("owner/llama", {**files, "pytorch_model.bin": b"a pickle"})
        run = train(tmp_path, "owner/llama", *STILL)
        asked = {request.path for request in hub.requests}
    assert "weights and tokenizer: from owner/llama" in capsys.readouterr().err
    assert any("model-00001-of" in path for path in asked) and not any("pytorch_model.bin" in path for path in asked)
    assert_same_model(run, theirs)
    assert "base_model: owner/llama" in (run.checkpoints_path / "last" / "README.md").read_text()


REFUSALS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "scaled rotation": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 500.0}},
        ["rope_parameters", "yarn"],
    ),
    "scaled rotation of transformers 4": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ["rope_scaling", "linear"],
    ),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    "bias of attention": ({"attention_bias": True}, ["self_attn", "bias", "missing"]),
    "bias of the mlp": ({"mlp_bias": True}, ["mlp.gate_proj.bias", "missing"]),
    "sliding window": ({"sliding_window": 128}, ["sliding_window", "128"]),
    "dropout": ({"attention_dropout": 0.1}, ["attention_dropout", "0.1"]),
    "quantized weights": ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
    "architecture": ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, ["model_type", "mistral"]),
    "another head": ({"architectures": ["LlamaForTokenClassification"]}, ["architectures", "TokenClassification"]),
    "another shape": ({"intermediate_size": 96}, ["mlp", "[80, 48]", "[96, 48]"]),
    "short context": ({"max_position_embeddings": 16}, ["data.sequence_length", "16 positions"]),
}


@pytest.mark.parametrize("name", [*REFUSALS, "only pickles", "a missing shard", "no tokenizer", "a larger tokenizer"])
def test_a_refusal_is_one_clear_error(
    theirs: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(theirs, model)
    changes, named = REFUSALS.get(name, ({}, []))
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, **changes}))
    if name == "only pickles":
        for path in model.glob("model*"):
            path.unlink()
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        named = ["pickle", "pytorch_model.bin", "save_pretrained"]
    elif name == "a missing shard":
        gone = sorted(model.glob("model-*.safetensors"))[1]
        gone.unlink()
        named = [gone.name, "missing"]
    elif name == "no tokenizer":
        (model / "tokenizer.json").unlink()
        named = ["tokenizer.json"]
    elif name == "a larger tokenizer":
        larger = Tokenizer.train(["far more words than the model has rows for, many of them long " * 9], 330)
        larger.save(model)
        named = [f"{larger.vocab_size} tokens", "304"]
    assert cli.run(["train", tiny_file(tmp_path), "--init", str(model), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "Traceback" not in said
    assert all(word in said for word in named), said
    assert not (tmp_path / "run" / "config.yaml").exists(), "nothing was begun"
