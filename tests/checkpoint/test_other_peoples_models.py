"""Model directories as other people leave them: what can be used is used, and the rest gets a way on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from smolforge.checkpoint.format import read_config, write_model
from smolforge.checkpoint.locate import load_model
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, CheckpointError, SmolforgeError
from smolforge.generation import Engine
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 5, 290)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    write_model(tmp_path / "model", config, build_model(config, seed=0).state_dict(), tokenizer)
    return tmp_path / "model"


def test_special_tokens_without_a_row_are_allowed_and_refused_in_a_prompt(directory: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(directory)
    tokenizer.backend.add_special_tokens(["<|tool|>", "<image>"])
    tokenizer.save(directory)
    engine = Engine.from_pretrained(directory, quantize="fp32")
    assert engine.generate("the <image>") is not None, "quoted special tokens are text"
    with pytest.raises(BadInput, match="whole numbers from 0 to"):
        engine.add(engine.tokenizer.encode_prompt("the <image>", special_tokens=True))
    tokenizer.backend.add_tokens([AddedToken("mats", special=False)])
    tokenizer.save(directory)
    with pytest.raises(BadInput, match="the model only"):
        load_model(directory)


def test_dropout_changes_nothing_outside_training(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.1}))
    assert read_config(directory).num_hidden_layers == 2
    assert load_model(directory)[0] is not None


def test_an_adapter_is_named_with_its_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(SmolforgeError, match="no directory owner/base here, and as a Hub id"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["runs/poket", "runs/poket/"])
def test_a_directory_with_a_similar_name_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pocket").mkdir(parents=True)
    with pytest.raises(SmolforgeError, match=r"(?s)poket.*Did you mean runs/pocket\?"):
        load_model(name)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model"])
def test_a_slow_tokenizer_gets_the_call_that_converts_it(directory: Path, name: str) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        load_model(directory)
    assert "AutoTokenizer.from_pretrained" in (caught.value.hint or "")
