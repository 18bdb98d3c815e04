"""A model in numbers, against what really is allocated, stored and computed."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quantized import Int4, Int8, quantize
from smolforge.config import ModelConfig
from smolforge.model.architecture import build_model
from smolforge.model.summary import flops_per_token, summarise, tree

SMALL = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
         "num_attention_heads": 6}  # fmt: skip
LLAMA = ModelConfig(**SMALL, num_key_value_heads=2)
UNTIED = ModelConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False)
RECREATION = ModelConfig(**SMALL, num_key_value_heads=6, architecture="recreation")


def test_smollm2_135m() -> None:
    summary = summarise(ModelConfig(), 2048)
    assert (summary.parameters, summary.tensors) == (134_515_008, 272)
    assert summary.groups == {
        "embedding": 49152 * 576,
        "attention": 30 * 576 * (576 + 192 + 192 + 576),
        "mlp": 30 * 3 * 576 * 1536,
        "norm": 61 * 576,
        "head": 0,
    }
    assert round(summary.flops_per_token["training"] / 1e9, 2) == 1.23  # DESIGN's figure at 2,048 positions
    assert summary.training_memory["fp32"]["state"] == 16 * 134_515_008
    assert summary.training_memory["bf16-pure"]["state"] == 8 * 134_515_008
    assert summary.serving_memory["cache_per_token"]["bf16"] == 2 * 30 * 3 * 64 * 2


def test_the_tree_reads_like_the_printed_model() -> None:
    text = tree(build_model(ModelConfig(), device="meta", seed=None))
    lines = text.splitlines()
    assert lines[0] == "LlamaForCausalLM("
    assert "      (0-29): 30 x LlamaDecoderLayer(" in lines
    assert "          (k_proj): Linear(in_features=576, out_features=192, bias=False)" in lines
    assert lines[-1] == "Total model parameters: 134,515,008"


def test_the_recreations_tree_names_its_own_parts() -> None:
    config = ModelConfig(architecture="recreation", num_key_value_heads=9)
    text = tree(build_model(config, device="meta", seed=None))
    assert text.startswith("SmollmV2Recreation(\n  (transformer)")
    assert "(k_proj): Linear(in_features=576, out_features=189, bias=False)" in text
    assert "weight=wte.weight" in text and "embed_tokens" not in text
    assert text.endswith("Total model parameters: 134,411,328")


@pytest.mark.parametrize("config", [LLAMA, UNTIED, RECREATION], ids=["llama", "untied", "recreation"])
def test_groups_add_up_and_json_is_plain(config: ModelConfig) -> None:
    summary = summarise(config, 128)
    model = build_model(config)
    assert summary.parameters == sum(p.numel() for p in model.parameters()) == sum(summary.groups.values())
    assert all(count > 0 for name, count in summary.groups.items() if name != "head")
    assert (summary.groups["head"] > 0) == (not config.tie_word_embeddings)
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["tensors"] == len(model.state_dict())
    lines = summary.lines()
    assert any(f"{summary.groups['mlp']:,}" in line for line in lines)
    assert any(f"{summary.flops_per_token['training'] / 1e6:.2f} MFLOP per token at 128" in line for line in lines)


@pytest.mark.parametrize("config", [LLAMA, UNTIED, RECREATION], ids=["llama", "untied", "recreation"])
def test_flops_are_those_of_the_matrix_products(config: ModelConfig) -> None:
    """torch counts the products of a forward and backward pass; attention spelled out, so that it is seen."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    model, length = build_model(config, attention=attend), 32
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() == length * flops_per_token(config, length)["training"]


@pytest.mark.parametrize("config", [LLAMA, RECREATION], ids=["llama", "recreation"])
def test_activations_are_near_what_autograd_keeps(config: ModelConfig) -> None:
    model, length = build_model(config), 128
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.decoder(torch.zeros(1, length, dtype=torch.long))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert hidden.requires_grad
    assert 1.0 <= measured / summarise(config, length).training_memory["fp32"]["activations"] < 1.2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_served_bytes_are_those_of_the_quantizer(precision: str) -> None:
    model = build_model(UNTIED)
    expected = 0
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            expected += 4 * weight.numel()  # norms stay in fp32
            continue
        stored = quantize(weight.detach(), precision, head="lm_head" in name or "embed" in name)  # type: ignore[arg-type]
        if isinstance(stored, Int8):
            expected += stored.values.nbytes + stored.scales.nbytes
        elif isinstance(stored, Int4):
            expected += (
                stored.values.nbytes // 2 + stored.scales.nbytes + stored.minima.nbytes
            )  # two to a byte once packed
        else:
            expected += stored.nbytes
    assert summarise(UNTIED, 128).serving_memory["weights"][precision] == expected


def test_a_summary_does_not_wait_for_torch_compile() -> None:
    """Importing it takes as long as torch itself; first weights that nobody sees would do so."""
    code = (
        "import sys\nfrom smolforge.config import ModelConfig\nfrom smolforge.model.summary import summarise\n"
        "print(summarise(ModelConfig()).parameters, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["134515008", "False"]
