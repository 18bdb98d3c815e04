"""The directory: what transformers reads of it, what is read back, what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.checkpoint.format import (
    check_weights,
    describe,
    read_config,
    read_generation_defaults,
    write_model,
)
from smolforge.checkpoint.weights import read_weights
from smolforge.config import ModelConfig
from smolforge.errors import BadInput, CheckpointError
from smolforge.model.architecture import architectures, build_model
from smolforge.tokenizer import Tokenizer


def edit(directory: Path, name: str = "config.json", **changes: Any) -> Path:
    """Change keys of a JSON file; a value of `...` removes the key."""
    path = directory / name
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_the_directory(tiny: Any, tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tiny.config.model_copy(update={"tie_word_embeddings": tied, "rope_theta": 5000.0, "rms_norm_eps": 1e-4})
    module = build_model(config, seed=3, dtype=dtype)
    write_model(tmp_path, config, module.state_dict(), tiny.tokenizer)
    theirs, told = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(told.values()), told
    assert theirs.dtype == dtype
    ids = torch.tensor([tiny.tokenizer.encode("the cat sat on the mat")])
    with torch.no_grad():
        difference = (theirs(ids).logits - module(ids)).abs().max().item()
    assert difference < (1e-5 if dtype == torch.float32 else 0.05)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tiny.tokenizer.eos_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("the cat sat 2024")["input_ids"] == tiny.tokenizer.encode("the cat sat 2024")
    assert tokenizer.eos_token == "<|endoftext|>"


def test_both_spellings_are_written(model_dir: Path) -> None:
    values = json.loads((model_dir / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 100_000.0
    assert values["torch_dtype"] == values["dtype"] == "float32"
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((model_dir / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_tied_head_is_not_stored_and_metadata_says_pt(model_dir: Path) -> None:
    from safetensors import safe_open

    with safe_open(model_dir / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a dict


def test_smollm2_135m_has_272_tensors() -> None:
    assert len(build_model(ModelConfig(), device="meta", seed=None).state_dict()) == 272


def test_writing_twice_gives_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.write(tmp_path / name)
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (6, 3), (5, 1)]),
    head_dim=st.sampled_from([None, 8, 16]),
    tied=st.booleans(),
    theta=st.floats(1, 1e7),
    eps=st.floats(1e-8, 1e-2),
    layers=st.integers(1, 40),
    architecture=st.sampled_from(sorted(architectures())),
)
def test_a_config_reads_back_equal(
    tmp_path_factory: Any,
    heads: Any,
    head_dim: Any,
    tied: bool,
    theta: float,
    eps: float,
    layers: int,
    architecture: Any,
) -> None:
    if architecture == "recreation":
        heads = (heads[0], heads[0])  # it has one key/value head for each query head
    config = ModelConfig(
        architecture=architecture, vocab_size=300, hidden_size=heads[0] * 8, intermediate_size=24, rope_theta=theta,
        num_hidden_layers=layers, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
        rms_norm_eps=eps, tie_word_embeddings=tied, no_rope_layer_interval=2 if architecture == "smollm3" else 0,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("config")
    (directory / "config.json").write_text(json.dumps(describe(config, "float32", {"eos_token_id": 0})))
    assert read_config(directory) == config


def test_transformers_own_directories_are_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=99,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=1,
            rope_theta=777.0,
            rms_norm_eps=1e-3,
        )
    )
    theirs.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (777.0, 1e-3, False)
    weights = check_weights(config, read_weights(tmp_path))
    assert torch.equal(weights["lm_head.weight"], theirs.lm_head.weight)


def test_shards_are_read_and_equal_the_single_file(tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny.write(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = read_weights(tmp_path / "one"), read_weights(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def test_absent_keys_have_the_defaults_of_transformers(model_dir: Path) -> None:
    edit(model_dir, rope_theta=..., rope_parameters=..., rope_scaling=..., rms_norm_eps=..., head_dim=...,
         tie_word_embeddings=..., num_key_value_heads=..., hidden_act=..., initializer_range=...)  # fmt: skip
    config = read_config(model_dir)
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (10_000.0, 1e-6, False)
    assert (config.num_key_value_heads, config.head_dim, config.initializer_range) == (4, 8, 0.02)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"model_type": ...}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3}, "different values"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"factor": 2.0}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5}}, "yarn"),
        ({"rope_parameters": {"rope_theta": 1e5, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        ({"rope_theta": 10_000.0}, "different values"),
        ({"rope_theta": "100000", "rope_parameters": ...}, "rope_theta"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"mlp_bias": 1}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"num_key_value_heads": 3}, "4 query heads"),
        ({"head_dim": 7}, "even"),
        ({"head_dim": None, "hidden_size": 33}, "multiple"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"intermediate_size": ...}, "intermediate_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(model_dir: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(edit(model_dir, **changes))
    assert named in str(caught.value)
    assert "config.json" in str(caught.value)


def test_neutral_rope_keys_are_accepted(model_dir: Path) -> None:
    edit(model_dir, rope_scaling={"rope_type": "default", "factor": 1.0}, pretraining_tp=2)
    assert read_config(model_dir).rope_theta == 100_000.0


def test_the_recreation_is_plainly_no_llama() -> None:
    from transformers import AutoConfig

    config = ModelConfig(architecture="recreation", vocab_size=300, num_key_value_heads=9)
    values = describe(config, "float32", {})
    assert (values["model_type"], values["architectures"]) == ("smolforge_recreation", ["SmollmV2Recreation"])
    with pytest.raises((ValueError, KeyError)):
        AutoConfig.for_model(values["model_type"])


def test_wrong_weights_name_the_tensor(tiny: Any) -> None:
    state = dict(tiny.module.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, word in (
        ({**state, name: state[name].T.contiguous()}, "expected [48, 32]"),
        ({**state, name: state[name].to(torch.int8)}, "int8"),
        ({key: value for key, value in state.items() if key != name}, "missing"),
        ({**state, name.replace("up", "side"): state[name]}, "unexpected tensor"),
        ({**state, "lm_head.weight": torch.zeros(290, 32)}, "tied"),
    ):
        with pytest.raises(CheckpointError) as caught:
            check_weights(tiny.config, changed)
        assert word in str(caught.value)


def test_a_redundant_tied_head_and_old_buffers_are_dropped(tiny: Any) -> None:
    state = dict(tiny.module.state_dict())
    extra = {
        "lm_head.weight": state["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    assert check_weights(tiny.config, {**state, **extra}).keys() == state.keys()


def test_a_vocabulary_larger_than_the_models_is_refused(tiny: Any, tmp_path: Path) -> None:
    config = tiny.config.model_copy(update={"vocab_size": 280})
    with pytest.raises(BadInput, match="290 tokens, the model only 280"):
        write_model(tmp_path / "m", config, {}, tiny.tokenizer)
    assert not (tmp_path / "m").exists()


def test_generation_defaults(model_dir: Path) -> None:
    assert read_generation_defaults(model_dir) == {"bos_token_id": 0, "eos_token_id": 0}
    edit(
        model_dir, "generation_config.json", temperature=0.6, top_p=None, eos_token_id=[0, 2], do_sample=True, made="up"
    )
    found = read_generation_defaults(model_dir)
    assert found == {"bos_token_id": 0, "eos_token_id": [0, 2], "temperature": 0.6, "do_sample": True}


@pytest.mark.parametrize(
    "changes",
    [{"temperature": -1}, {"top_p": 2}, {"eos_token_id": "x"}, {"top_k": True}, {"min_p": float("nan")}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_bad_generation_default_is_named(model_dir: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        read_generation_defaults(edit(model_dir, "generation_config.json", **changes))


def test_a_directory_without_the_file_has_no_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == {}


def test_the_released_configurations_are_read(real_data: Path, tmp_path: Path) -> None:
    for name, parameters in (("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120)):
        (tmp_path / "config.json").write_bytes((real_data / "config" / f"{name}.json").read_bytes())
        config = read_config(tmp_path)
        model = build_model(config, device="meta", seed=None)
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_trained_tokenizer_survives_the_directory(tiny: Any, model_dir: Path) -> None:
    again = Tokenizer.from_pretrained(model_dir)
    text = "the cat sat <|endoftext|> on 12 mats é 🙂"
    assert again.encode(text) == tiny.tokenizer.encode(text)
    assert again.eos_id == tiny.tokenizer.eos_id


@pytest.mark.parametrize("positions", [64, 512])
def test_the_tokenizers_longest_text_is_the_models(tiny: Any, tmp_path: Path, positions: int) -> None:
    """transformers warns of longer texts, and truncates to it where asked."""
    config = tiny.config.model_copy(update={"max_position_embeddings": positions})
    write_model(tmp_path, config, tiny.module.state_dict(), tiny.tokenizer)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == positions
