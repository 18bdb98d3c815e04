"""Importing a Lightning checkpoint: both architectures, every wrapping, and files that mean harm."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from import_lightning import import_lightning, main, strip_prefixes
from torch import Tensor, nn

from smolforge.checkpoint import locate
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, CheckpointError
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {"vocab_size": 290, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
                         "num_attention_heads": 3, "head_dim": 16, "max_position_embeddings": 64}  # fmt: skip
LLAMA = ModelConfig(**SHAPE, num_key_value_heads=1)
UNTIED = ModelConfig(**SHAPE, num_key_value_heads=1, tie_word_embeddings=False)
RECREATION = ModelConfig(**SHAPE, num_key_value_heads=3, architecture="recreation", rope_theta=10_000.0)
CONFIGS = {"llama": LLAMA, "untied": UNTIED, "recreation": RECREATION}
PREFIXES = ["", "model.", "model._orig_mod.", "_orig_mod.model.", "_orig_mod.model.model._orig_mod."]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat " * 20], 290)


def save(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """A checkpoint as Lightning 2 writes it, with moments, loops and hyper-parameters."""
    content = {
        "epoch": 0, "global_step": 5000, "pytorch-lightning_version": "2.4.0", "state_dict": state, "loops": {},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(2.5), "best_model_path": "a.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 3e-4}]}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 3e-4}, **more,
    }  # fmt: skip
    torch.save(content, path)
    return path


def wrapped(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_import_gives_the_same_logits(tmp_path: Path, tokenizer: Any, kind: str, prefix: str) -> None:
    module = build_model(CONFIGS[kind], seed=3)
    path = save(tmp_path / "seed.ckpt", wrapped(module, prefix))
    found = import_lightning(path, tmp_path / "out", tokenizer, head_dim=16, max_position_embeddings=64)
    assert (found.step, found.left_out) == (5000, [])
    loaded, _, _ = locate.load_model(tmp_path / "out")
    assert loaded.config == CONFIGS[kind] == found.config
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids), module(ids))


def test_the_released_shape_needs_no_options(tmp_path: Path, tokenizer: Any) -> None:
    config = ModelConfig(vocab_size=290, num_hidden_layers=1)
    path = save(tmp_path / "seed.ckpt", wrapped(build_model(config), "model.model."))
    assert import_lightning(path, tmp_path / "out", tokenizer).config == config
    recreation = ModelConfig(vocab_size=290, num_hidden_layers=1, architecture="recreation", num_key_value_heads=9,
                             rope_theta=10_000.0, max_position_embeddings=2048)  # fmt: skip
    path = save(tmp_path / "recreation.ckpt", wrapped(build_model(recreation), "model._orig_mod."))
    assert import_lightning(path, tmp_path / "recreation", tokenizer).config == recreation


@pytest.mark.parametrize("kind", ["llama", "recreation"])
def test_a_tied_head_and_tables_are_left_out(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    module = build_model(CONFIGS[kind])
    state = wrapped(module, "model.")
    state["model.lm_head.weight"] = module.output_weight.detach().clone()
    state["model.model.rotary_emb.inv_freq"] = torch.ones(8)
    found = import_lightning(save(tmp_path / "a.ckpt", state), tmp_path / "out", tokenizer, head_dim=16)
    assert set(found.left_out) == {"lm_head.weight", "model.model.rotary_emb.inv_freq"}
    assert found.config.tie_word_embeddings
    assert "lm_head.weight" not in locate.load_model(tmp_path / "out")[0].state_dict()


def test_transformers_loads_the_imported_llama(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    module = build_model(LLAMA, seed=5)
    path = save(tmp_path / "seed.ckpt", wrapped(module, "model._orig_mod."))
    import_lightning(path, tmp_path / "out", tokenizer, head_dim=16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    assert (theirs(ids).logits - module(ids)).abs().max() < 1e-5


def test_the_card_says_that_the_recreation_is_no_llama(tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "seed.ckpt", wrapped(build_model(RECREATION), "model."))
    import_lightning(path, tmp_path / "out", tokenizer, head_dim=16)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "not a Llama" in card and "step 5,000" in card and "10,000" in card
    assert "Llama" not in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


def test_a_bare_state_dict_in_the_old_format_is_read_too(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "old.ckpt"
    torch.save(wrapped(build_model(LLAMA), "model."), path, _use_new_zipfile_serialization=False)
    found = import_lightning(path, tmp_path / "out", tokenizer, head_dim=16)
    assert found.step is None and found.config.num_hidden_layers == 2


class Harm:
    """Unpickled by an ordinary reader, this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict"])
def test_a_hostile_pickle_is_named_and_not_run(tmp_path: Path, tokenizer: Any, place: str, zipped: bool) -> None:
    target = tmp_path / "harmed"
    content: dict[str, Any] = {"state_dict": wrapped(build_model(LLAMA), "model."), "hyper_parameters": {}}
    content[place]["x"] = Harm(target)
    path = tmp_path / "hostile.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir; nothing of it was run") as caught:
        import_lightning(path, tmp_path / "out", tokenizer, head_dim=16)
    assert caught.value.exit_code == 2 and "weights alone" in str(caught.value)
    assert not target.exists()
    assert not (tmp_path / "out").exists()
    torch.load(path, weights_only=False)  # the file is a real one: read without care, it does its harm
    assert target.exists()


def test_a_bare_hostile_pickle_is_not_run(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bare.ckpt"
    path.write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    with pytest.raises(CheckpointError):
        import_lightning(path, tmp_path / "out", tokenizer)
    assert not (tmp_path / "harmed").exists()


def spoiled(kind: str) -> dict[str, Tensor]:
    return wrapped(build_model(CONFIGS[kind]), "model.")


def without(kind: str, name: str) -> dict[str, Tensor]:
    return {key: value for key, value in spoiled(kind).items() if key != name}


BAD_STATES = {
    "another architecture": (
        {"model.transformer.h.0.attn.c_attn.weight": torch.zeros(4, 4)},
        "no architecture of ours",
    ),
    "both at once": ({**spoiled("llama"), **wrapped(build_model(RECREATION), "")}, "more than one embedding"),
    "a missing tensor": (without("llama", "model.model.layers.1.mlp.up_proj.weight"), "up_proj.weight' is missing"),
    "no queries": (without("llama", "model.model.layers.0.self_attn.q_proj.weight"), "q_proj.weight' is missing"),
    "a bias": ({**spoiled("llama"), "model.model.norm.bias": torch.zeros(48)}, "unexpected tensor 'model.norm.bias'"),
    "a wrong shape": ({**spoiled("llama"), "model.model.norm.weight": torch.zeros(47)}, r"\[47\], expected \[48\]"),
    "a vector for a matrix": (
        {**spoiled("llama"), "model.model.embed_tokens.weight": torch.zeros(4)},
        r"embed_tokens.weight' is \[4\], no matrix",
    ),
    "odd heads": (
        {**spoiled("llama"), "model.model.layers.0.self_attn.q_proj.weight": torch.zeros(50, 48)},
        "50 rows of queries are not heads of width 16",
    ),
    "fewer narrow heads": (
        {**spoiled("recreation"), "model.transformer.h.0.attn.k_proj.weight": torch.zeros(5, 48)},
        "it must be 3, not 1",
    ),
    "a gap in the layers": (
        {k.replace("layers.1.", "layers.7."): v for k, v in spoiled("llama").items()},
        "layers.1.*is missing",
    ),
    "whole numbers": (
        {name: tensor.to(torch.int8) for name, tensor in spoiled("llama").items()},
        "torch.int8; float32",
    ),
    "nothing": ({}, "no state_dict of tensors"),
}


@pytest.mark.parametrize("what", BAD_STATES)
def test_anything_else_is_one_clear_error(tmp_path: Path, tokenizer: Any, what: str) -> None:
    state, words = BAD_STATES[what]
    path = save(tmp_path / "bad.ckpt", state)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_lightning(path, tmp_path / "out", tokenizer, head_dim=16)
    assert str(path) in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.ckpt"]


@pytest.mark.parametrize(
    ("data", "words"),
    [(None, "no such file"), (b"", "damaged or no torch"), (b"PK\x03\x04" + b"\0" * 99, "damaged or no torch"),
     (b"not a checkpoint at all", "damaged or no torch")],
    ids=["missing", "empty", "half a zip", "text"],
)  # fmt: skip
def test_a_file_that_is_none(tmp_path: Path, tokenizer: Any, data: bytes | None, words: str) -> None:
    path = tmp_path / "x.ckpt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        import_lightning(path, tmp_path / "out", tokenizer)


def test_a_cut_file(tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "x.ckpt", spoiled("llama"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged or no torch"):
        import_lightning(path, tmp_path / "out", tokenizer)


def test_a_flipped_bit_of_a_weight_is_found(tmp_path: Path, tokenizer: Any) -> None:
    state = spoiled("llama")
    path = save(tmp_path / "x.ckpt", state)
    data = bytearray(path.read_bytes())
    place = data.index(state["model.model.layers.1.mlp.up_proj.weight"].numpy().tobytes())
    data[place + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the bytes of .*data/\d+ are not those of its checksum"):
        import_lightning(path, tmp_path / "out", tokenizer, head_dim=16)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": [1]}, {"state_dict": {"a": 1}}, torch.zeros(2)])
def test_other_contents(tmp_path: Path, tokenizer: Any, content: Any) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"not a Lightning checkpoint|not a mapping|no state_dict"):
        import_lightning(tmp_path / "x.ckpt", tmp_path / "out", tokenizer)


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "x.ckpt", spoiled("llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept", encoding="utf-8")
    with pytest.raises(BadInput, match="is not empty"):
        import_lightning(path, tmp_path / "out", tokenizer, head_dim=16)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_tokenizer_too_large_for_the_model_leaves_nothing_behind(tmp_path: Path, tokenizer: Any) -> None:
    small = build_model(ModelConfig(**{**LLAMA.model_dump(), "vocab_size": 100}))
    path = save(tmp_path / "x.ckpt", wrapped(small, "model."))
    with pytest.raises(BadInput, match="tokens, the model only 100"):
        import_lightning(path, tmp_path / "out", tokenizer, head_dim=16)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_tensor_beside_the_model_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "x.ckpt", spoiled("llama") | {"metric.weight": torch.zeros(2)})
    with pytest.raises(
        CheckpointError, match=r"'metric\.weight' is unexpected: the model's names begin with 'model\.'"
    ):
        import_lightning(path, tmp_path / "out", tokenizer, head_dim=16)


def test_names_that_become_one_are_refused() -> None:
    state = {"model.embed_tokens.weight": torch.zeros(2, 2), "_orig_mod.model.embed_tokens.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match="twice"):
        strip_prefixes(state)


def test_the_command(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    state = {f"model._orig_mod.{name}": tensor for name, tensor in build_model(RECREATION, seed=1).state_dict().items()}
    path = save(tmp_path / "seed.ckpt", state)
    words = [str(path), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")]
    # 48 rows are not heads of width 64, which is assumed unless given.
    assert main(words) == 2 and "heads of width 64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--head-dim", "16", "--positions", "64"]) == 0
    assert "recreation at step 5,000" in capsys.readouterr().out
    assert locate.load_model(tmp_path / "out")[0].config == RECREATION
