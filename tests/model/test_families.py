"""Llama with all its options, Qwen2, Qwen3 and SmolLM3: logits of transformers on random shapes, files, training, native."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from smolforge import kernels
from smolforge.checkpoint.format import write_model
from smolforge.checkpoint.locate import load_model
from smolforge.config import ModelConfig
from smolforge.errors import BadInput
from smolforge.generation.runners.cpu import CpuRunner
from smolforge.generation.sequence import ScheduledChunk
from smolforge.model.architecture import CausalLM, build_model, config_from_hf, config_to_hf
from smolforge.tokenizer import Tokenizer

FAMILIES = ("llama", "qwen2", "qwen3", "smollm3")


def shape(family: str, seed: int) -> ModelConfig:
    """A random configuration of a family."""
    draw = random.Random(f"{family} {seed}")
    kv = draw.choice([1, 2, 3])
    heads = kv * draw.choice([1, 2, 4])
    head_dim = draw.choice([8, 12, 16, 32])
    values: dict[str, Any] = {
        "vocab_size": draw.choice([97, 300]), "hidden_size": heads * draw.choice([8, 16, head_dim]),
        "intermediate_size": draw.choice([48, 100, 160]), "num_hidden_layers": draw.choice([1, 2, 5]),
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "max_position_embeddings": 256,
        "rope_theta": draw.choice([10_000.0, 500_000.0]), "tie_word_embeddings": draw.random() < 0.5, "initializer_range": 0.02,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
    }  # fmt: skip
    if family != "qwen2":
        values["attention_bias"] = draw.random() < 0.5
    if family in ("llama", "smollm3"):
        values["mlp_bias"] = draw.random() < 0.5
    if family == "smollm3":
        values["no_rope_layer_interval"] = draw.choice([1, 2, 4])
    if draw.random() < 0.5:
        values["rope_scaling"] = {
            "factor": draw.choice([8.0, 32.0]), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": draw.choice([32, 8192]),
        }  # fmt: skip
    return ModelConfig(architecture=family, **values)


def make(config: ModelConfig) -> CausalLM:
    """Weights, biases and norms that all matter."""
    module = build_model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return module.eval()


def theirs(config: ModelConfig, module: CausalLM) -> Any:
    import transformers

    description = transformers.AutoConfig.for_model(**config_to_hf(config))
    model = transformers.AutoModelForCausalLM.from_config(description)
    found = model.load_state_dict(module.state_dict(), strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def _tokens(config: ModelConfig, count: int = 70) -> list[int]:
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    for seed in range(20):
        config = shape(family, seed)
        module, ids = make(config), torch.tensor([_tokens(config)])
        assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
        with torch.no_grad():
            ours, expected = module(ids), theirs(config, module)(ids).logits
        assert (ours - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), config


@pytest.mark.skipif(kernels.unavailable() is not None, reason="the native code cannot be built here")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_step_computes_the_same(family: str) -> None:
    for seed in range(6):
        config = shape(family, seed)
        module, ids = make(config), _tokens(config)
        with torch.no_grad():
            expected = module(torch.tensor([ids]))[0]
        for precision, limit in (("fp32", 2e-5), ("bf16", 0.03), ("int8", 0.1)):
            runner = CpuRunner(module, precision)
            cache = runner.new_cache(len(ids))
            parts = [runner.forward([ScheduledChunk(cache, ids[:40], 0, 40)])]
            parts += [runner.forward([ScheduledChunk(cache, [ids[i]], i, 1)]) for i in range(40, len(ids))]
            found = torch.cat(parts)
            assert float((found - expected).norm() / expected.norm()) < limit, (config, precision)
            whole = runner.forward([ScheduledChunk(runner.new_cache(len(ids)), ids, 0, len(ids))])
            assert torch.equal(whole, found), (config, precision)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_is_transformers_own(family: str, tmp_path: Path) -> None:
    import transformers

    tokenizer = Tokenizer.train(["the cat sat on the mat " * 20], 290)
    config = shape(family, 3).model_copy(update={"vocab_size": 300})
    module = make(config)
    write_model(tmp_path, config, module.state_dict(), tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([_tokens(config)])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, module(ids), atol=1e-5, rtol=1e-5)
    found, _, _ = load_model(tmp_path)
    assert found.config == config and all(
        torch.equal(a, b) for a, b in zip(found.parameters(), module.parameters(), strict=True)
    )
    model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    tokenizer.save(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1, "several files"
    assert load_model(tmp_path / "again")[0].config == config


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(family: str) -> None:
    config = shape(family, 5)
    module, ids = make(config), torch.tensor([_tokens(config)])
    other = theirs(config, module)
    loss, _ = module.train().loss(ids[:, :-1], ids[:, 1:], scale=1 / (ids.numel() - 1))
    loss.backward()
    expected = torch.nn.functional.cross_entropy(other(ids[:, :-1]).logits[0], ids[0, 1:])
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3), name


REFUSED = [
    ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers"),
    ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
    ({"model_type": "llama", "attention_bias": "yes"}, "attention_bias"),
    ({"model_type": "qwen2", "attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=[f"{c['model_type']} {f}" for c, f in REFUSED])
def test_what_a_family_does_not_have_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    base = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    with pytest.raises(BadInput) as caught:
        config_from_hf({**base, **changes})
    assert field in str(caught.value)


def test_the_window_that_qwen_names_and_does_not_use_is_ignored() -> None:
    values = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21,
        "tie_word_embeddings": True, "hidden_act": "silu", "attention_dropout": 0.0, "use_mrope": False,
    }  # fmt: skip
    assert config_from_hf(values).head_dim == 64, "Qwen2.5-0.5B"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_is_read_back_and_as_transformers_reads_it(family: str, tmp_path: Path) -> None:
    from smolforge.export.gguf import export_gguf

    tokenizer = Tokenizer.train(["the cat sat on the mat " * 20], 290)
    for seed in range(6):
        changes = {"vocab_size": 300, "attention_bias": False} if family == "qwen3" else {"vocab_size": 300}
        if family == "smollm3":
            changes["no_rope_layer_interval"] = 4
        config = shape(family, seed).model_copy(update=changes)
        module = make(config)
        write_model(tmp_path / "m", config, module.state_dict(), tokenizer)
        path = export_gguf(tmp_path / "m", tmp_path / "m.gguf", kind="f32").path
        found, _, _ = load_model(path)
        assert found.config.model_copy(update={"rms_norm_eps": config.rms_norm_eps}) == config
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), module.parameters(), strict=True))
        if family.startswith("qwen"):
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

            read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs(config, module))["tensors"]
            state = module.state_dict()
            assert set(read) == set(state) and all(torch.equal(tensor, state[name]) for name, tensor in read.items())


def test_what_llama_cpp_does_not_have_is_not_exported(tmp_path: Path) -> None:
    from smolforge.export.gguf import export_gguf

    tokenizer = Tokenizer.train(["the cat sat on the mat " * 20], 290)
    for family, changes in (("qwen3", {"attention_bias": True}), ("smollm3", {"no_rope_layer_interval": 2})):
        config = shape(family, 0).model_copy(update={"vocab_size": 300, **changes})
        write_model(tmp_path / family, config, make(config).state_dict(), tokenizer)
        with pytest.raises(BadInput, match="has no such biases or rotation"):
            export_gguf(tmp_path / family, tmp_path / "x.gguf", kind="f32")
