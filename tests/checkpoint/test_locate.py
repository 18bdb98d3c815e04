"""From a name to a model: every form, and what is said where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from smolforge import hub
from smolforge.checkpoint.format import read_config, write_model
from smolforge.checkpoint.locate import HUB_FILES, load_model, resolve_model
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, CheckpointError, SourceUnavailable
from smolforge.model.architecture import build_model


def test_every_form_of_a_name(checkpoints: Path, model_dir: Path) -> None:
    newest = checkpoints / "step-00000003"
    assert resolve_model(checkpoints.parent) == resolve_model(checkpoints) == resolve_model(newest) == newest
    assert resolve_model(str(checkpoints / "last")).resolve() == newest
    assert resolve_model(model_dir) == model_dir


def test_a_hub_id_is_fetched_without_pickles(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hub, "fetch_model", lambda name, patterns: (asked.append((name, patterns)), model_dir)[1])
    assert resolve_model("HuggingFaceTB/SmolLM2-135M@main") == model_dir
    assert asked == [("HuggingFaceTB/SmolLM2-135M@main", HUB_FILES)]
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in HUB_FILES)


def test_a_silent_hub_says_that_there_is_no_such_directory_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # the checkout has a runs/pocket after `make demo`

    def silent(name: str, patterns: list[str]) -> Path:
        raise SourceUnavailable("cannot reach the Hub")

    monkeypatch.setattr(hub, "fetch_model", silent)
    with pytest.raises(SourceUnavailable, match="no directory runs/pocket here"):
        resolve_model("runs/pocket")


def test_what_was_looked_for_is_said(tmp_path: Path, checkpoints: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    for path, words in (
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path / "nowhere.gguf", "no such file"),
        (tmp_path / "begun", "no checkpoint yet"),
    ):
        with pytest.raises(CheckpointError, match=words):
            resolve_model(path)
    for manifest in checkpoints.glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="3 checkpoints, none of them whole"):
        resolve_model(checkpoints.parent)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        resolve_model(checkpoints / "last")


def test_load_gives_equal_logits_and_no_second_copy(tiny: Any, model_dir: Path) -> None:
    module, tokenizer, path = load_model(model_dir)
    assert path == model_dir and not module.training
    ids = torch.tensor([tokenizer.encode("the cat sat on")])
    with torch.no_grad():
        assert torch.equal(module(ids), tiny.module(ids))
    # The parameters are the mapped file: the kernel's list of mappings names it.
    assert str(model_dir / "model.safetensors") in Path("/proc/self/maps").read_text()
    pointers = {p.data_ptr() for p in module.parameters()}
    assert len(pointers) == len(list(module.parameters()))
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_load_in_another_type(model_dir: Path, dtype: torch.dtype) -> None:
    module, _, _ = load_model(model_dir, dtype=dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}


def test_a_file_with_mixed_types_gets_that_of_the_embedding(tiny: Any, tmp_path: Path) -> None:
    state = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tiny.module.state_dict().items()}
    write_model(tmp_path, tiny.config, state, tiny.tokenizer)
    assert {p.dtype for p in load_model(tmp_path)[0].parameters()} == {torch.bfloat16}


def test_loaded_weights_may_be_trained_without_touching_the_file(model_dir: Path) -> None:
    before = (model_dir / "model.safetensors").read_bytes()
    module, _, _ = load_model(model_dir)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert (model_dir / "model.safetensors").read_bytes() == before


def test_the_recreation_goes_through_the_same_doors(tiny: Any, tmp_path: Path) -> None:
    config = ModelConfig(
        architecture="recreation", vocab_size=290, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3,
    )  # fmt: skip
    module = build_model(config, seed=1)
    write_model(tmp_path, config, module.state_dict(), tiny.tokenizer)
    assert read_config(tmp_path) == config
    again, _, _ = load_model(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(again(ids), module(ids))


def test_a_tokenizer_larger_than_the_model_is_refused(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    from smolforge.tokenizer import Tokenizer

    bigger = Tokenizer.train(["many other words to learn from, far more than before " * 9], 320)
    assert bigger.vocab_size > 290
    bigger.save(model_dir)
    with pytest.raises(BadInput, match="the model only 290"):
        load_model(model_dir)


def test_a_plain_copy_of_a_checkpoint_is_still_verified(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "step-00000002", tmp_path / "my-model")
    assert load_model(tmp_path / "my-model")[2] == tmp_path / "my-model"
    with (tmp_path / "my-model" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_model(tmp_path / "my-model")


def test_half_precision_runs_in_fp32_on_a_cpu(tmp_path: Path, model_dir: Path) -> None:
    """Files of float16, as TinyLlama's kind has them: all numbers are kept, and the native step takes them."""
    from smolforge.generation import Engine

    module, tokenizer, _ = load_model(model_dir)
    write_model(tmp_path / "half", module.config, module.half().state_dict(), tokenizer, dtype=torch.float16)
    found, _, _ = load_model(tmp_path / "half")
    for name, tensor in module.state_dict().items():
        assert found.state_dict()[name].dtype == torch.float32 and torch.equal(
            found.state_dict()[name], tensor.float()
        ), name
    assert (
        load_model(tmp_path / "half", dtype=torch.float16)[0].state_dict()["model.norm.weight"].dtype == torch.float16
    )
    assert "native" in Engine.from_pretrained(tmp_path / "half").runner.name
