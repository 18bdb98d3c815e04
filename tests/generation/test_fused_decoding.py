"""The Triton kernels of a decoding step against the module: on a GPU where there is one, else in Triton's interpreter.

It skips where there is no Triton.
"""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import prepare

from smolforge.config import ModelConfig
from smolforge.generation.runners.cuda import CudaRunner, StaticCache
from smolforge.model.architecture import build_model
from smolforge.model.lora import LoraConfig, add_adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    prepare()
else:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for CUDA")

from smolforge.generation.runners import fused  # noqa: E402  (imports Triton)

CONTEXT = 600  # of which KEYS are in use: more than one part of attention, and no multiple of a tile
SHAPES = {
    "tied": {"hidden_size": 96, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 32},
    # A width of heads that is not a power of two, groups of 3, more columns than a tile has, scaled rotation, a head.
    "odd": {"hidden_size": 136, "intermediate_size": 140, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 12, "tie_word_embeddings": False, "rope_theta": 10_000.0,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64}},
}  # fmt: skip


def make(shape="tied", dtype=torch.float32, **changes):
    """A tiny Llama whose norms and residual branches matter."""
    values = {"vocab_size": 100, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    module = build_model(ModelConfig(**{**values, **SHAPES[shape], **changes}), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise)
    return module.to(DEVICE, dtype).eval()


def make_step(module):
    """The fused step of a module that it must accept."""
    step = fused.fused_step(module, CONTEXT)
    assert step is not None
    return step


def make_rows(module, rows):
    """Tokens, positions and a memory with two slots more than rows; every third row from the second has no sequence."""
    c, generator = module.config, torch.Generator().manual_seed(rows)
    shape = rows + 2, c.num_hidden_layers, 2 * c.num_key_value_heads, CONTEXT + 1, c.head_dim
    memory = torch.randn(shape, generator=generator).to(module.output_weight)
    tokens = torch.randint(0, c.vocab_size, (rows,), generator=generator)
    positions = torch.randint(0, CONTEXT, (rows,), generator=generator)
    positions[0] = CONTEXT - 1
    positions[2::3] = torch.arange(len(positions[2::3])) * 63  # 0, and around the borders of tiles
    positions[1::3] = CONTEXT
    return tokens.to(DEVICE), positions.to(DEVICE), memory


@torch.no_grad()
def module_logits(module, tokens, positions, memory):
    """What the runner's step computes without the kernels."""
    cache = StaticCache(memory, positions[:, None], CONTEXT)
    return module(tokens[:, None], positions=positions[:, None], cache=cache)[:, 0]


CASES = [(s, r, d) for s in SHAPES for r in (1, 3, 17) for d in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("shape, rows, dtype", [*CASES, ("tied", 3, torch.float16)])
def test_the_kernels_compute_what_the_module_computes(shape, rows, dtype):
    module = make(shape, dtype)
    tokens, positions, memory = make_rows(module, rows)
    before, theirs = memory.clone(), memory.clone()
    expected = module_logits(module, tokens, positions, theirs)
    with torch.no_grad():
        logits = make_step(module)(tokens, positions, memory, CONTEXT)
    busy = (positions < CONTEXT).nonzero()[:, 0]
    assert logits.shape == expected.shape and logits.dtype == dtype
    error = (logits - expected)[busy].float().norm() / expected[busy].float().norm()
    limit = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert error < limit, f"relative error {error:.2g}"

    written = torch.zeros_like(memory, dtype=torch.bool)
    written[torch.arange(rows, device=DEVICE), :, :, positions] = True
    new, wanted = ((m[busy, :, :, positions[busy]]).float() for m in (memory, theirs))
    torch.testing.assert_close(new[:, 0], wanted[:, 0], rtol=limit, atol=limit)
    assert (new - wanted).norm() / wanted.norm() < limit
    assert torch.equal(memory[~written], before[~written]), "only the rows' own positions are written"


@pytest.mark.parametrize("dot_rows", [1, 9])
@pytest.mark.parametrize("rows", [1, 5])
def test_both_ways_of_multiplying_agree(rows, dot_rows, monkeypatch):
    module = make()
    tokens, positions, memory = make_rows(module, rows)
    expected = module_logits(module, tokens, positions, memory.clone())
    monkeypatch.setattr(fused, "DOT_ROWS", dot_rows)
    with torch.no_grad():
        logits = make_step(module)(tokens, positions, memory, CONTEXT)
    busy = positions < CONTEXT
    torch.testing.assert_close(logits[busy], expected[busy], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [600, 128])
def test_long_texts_are_divided_and_short_ones_are_not(keys):
    assert (fused._splits(2, 600) > 1) and fused._splits(2, 128) == fused._splits(300, 600) == 1
    module = make()
    tokens, positions, memory = make_rows(module, 3)
    positions[0] = 100
    expected = module_logits(module, tokens, positions, memory.clone())
    with torch.no_grad():
        logits = make_step(module)(tokens, positions, memory, keys)
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)
    assert logits.isfinite().all(), "a row without a sequence reads no keys"


def test_what_other_sequences_left_is_not_read():
    module = make()
    tokens, positions, memory = make_rows(module, 3)
    dirty = memory.clone()
    for row, position in enumerate(positions.tolist()):
        dirty[row, :, :, (0 if position == CONTEXT else position) :] = torch.nan
    with torch.no_grad():
        step = make_step(module)
        assert torch.equal(step(tokens, positions, memory, CONTEXT), step(tokens, positions, dirty, CONTEXT))


def test_nan_in_a_weight_reaches_the_logits():
    module = make()
    tokens, positions, memory = make_rows(module, 1)
    with torch.no_grad():
        step = make_step(module)
        module.model.layers[0].self_attn.k_proj.weight[3, 3] = torch.nan
        assert step(tokens, positions, memory, CONTEXT).isnan().all()


@pytest.mark.parametrize("other", [
    {"architecture": "qwen2"}, {"architecture": "qwen3"}, {"architecture": "smollm3", "no_rope_layer_interval": 2},
    {"architecture": "recreation", "num_key_value_heads": 4}, {"attention_bias": True}, {"mlp_bias": True},
])  # fmt: skip
def test_other_models_are_left_to_the_module(other):
    assert fused.fused_step(make(**other), CONTEXT) is None


def test_adapters_and_mixed_precisions_are_left_to_the_module():
    module = make()
    add_adapter(module, LoraConfig(r=2))
    mixed = make()
    mixed.model.norm.bfloat16()
    assert fused.fused_step(module, CONTEXT) is None and fused.fused_step(mixed, CONTEXT) is None


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_kernels_write_what_the_module_writes(precision, tokenizer):
    from smolforge.generation import Engine, SamplingParams

    module, texts = make(vocab_size=400), []
    params = SamplingParams(temperature=0, max_tokens=40 if precision == "fp32" else 8, ignore_eos=True)
    for use in (True, False):
        runner = CudaRunner(module, precision)
        assert runner._fused is not None
        if not use:
            runner._fused = None
        engine = Engine(runner, tokenizer, max_batch=4)
        requests = [engine.add([i + 1] * (3 * i + 1), params) for i in range(3)]
        while engine.busy:
            engine.step()
        assert (runner._fused is not None) == use, "the kernels could not be compiled"
        texts.append([request.sequences[0].tokens for request in requests])
    assert texts[0] == texts[1]
