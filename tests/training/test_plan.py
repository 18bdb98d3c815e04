"""Decisions before the first step: each has an effect, a reason, and a refusal where it cannot be kept."""

import copy
from functools import partial

import pytest
import torch
from tiny import TINY

from cards import CARDS, Card, insert_cards
from smolforge import config as configuration
from smolforge import kernels
from smolforge.config import RunConfig
from smolforge.devices import gpu_of
from smolforge.errors import BadInput
from smolforge.model import attention
from smolforge.model.architecture import build_model
from smolforge.training import optim, plan
from smolforge.training.optim import adamw
from smolforge.training.plan import make_plan, memory_of, planned_memory
from smolforge.training.precision import choose_precision
from smolforge.training.recipe import resolve_batch

CPU = torch.device("cpu")


def configured(**training: object) -> RunConfig:
    sections = copy.deepcopy(TINY)
    sections["training"] |= training
    return RunConfig.model_validate(sections)


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(attention, "native_unavailable", lambda: "no compiler")


@pytest.mark.parametrize("way", ["blocked", "sdpa", "sdpa-fp32"])
def test_attention_reaches_every_layer(way) -> None:
    config = configured(attention=way)
    chosen = make_plan(config, CPU, 1)
    model = build_model(config.model, **chosen.model_options)
    assert {layer.self_attn.attend for layer in model.model.layers} == {attention.ATTENTION[way]}
    assert any(reason.startswith(f"attention: {way} (as asked") for reason in chosen.reasons)


def variants() -> dict[str, RunConfig]:
    """bf16 at a short and a long length, and with document borders."""
    config = configured(precision="bf16", tokens_per_step=4096)
    model = config.model.model_copy(update={"max_position_embeddings": 2048})
    long = config.data.model_copy(update={"sequence_length": 2048})
    masked = config.data.model_copy(update={"mask_documents": True})
    return {
        "short": config,
        "long": config.model_copy(update={"data": long, "model": model}),
        "masked": config.model_copy(update={"data": masked}),
    }


def test_attention_without_the_native_one(no_native) -> None:
    assert make_plan(configured(precision="fp32"), CPU, 1).attention == "sdpa"
    expected = {"short": "blocked", "long": "sdpa-fp32", "masked": "blocked"}
    for name, config in variants().items():
        chosen = make_plan(config, CPU, 1)
        assert chosen.attention == expected[name]
        assert any("native: no compiler" in reason for reason in chosen.reasons)
    with pytest.raises(BadInput, match="no compiler"):
        make_plan(configured(attention="native"), CPU, 1)


@pytest.mark.parametrize("missing", [None, "no compiler"])
def test_the_update_of_bf16_weights_is_said(monkeypatch, missing) -> None:
    monkeypatch.setattr(kernels, "unavailable", lambda: missing)
    chosen = make_plan(configured(precision="bf16-pure"), CPU, 1)
    (line,) = (reason for reason in chosen.reasons if reason.startswith("update: "))
    assert chosen.update == ("torch" if missing else "native")
    assert line.startswith(f"update: {'torch' if missing else 'native C++'} (") and ("no compiler" in line) == (
        missing is not None
    )
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    optimizer = optim.build_optimizer(model, configured(precision="bf16-pure").optimizer, update=chosen.update)
    assert optimizer._update is (adamw.update_in_pieces if missing else adamw.native_update)
    assert not any(reason.startswith("update") for reason in make_plan(configured(), CPU, 1).reasons)


def test_native_attention_for_bf16(monkeypatch) -> None:
    monkeypatch.setattr(attention, "native_unavailable", lambda: None)
    assert {make_plan(config, CPU, 1).attention for config in variants().values()} == {"native"}
    assert make_plan(configured(precision="fp32"), CPU, 1).attention == "sdpa"
    config = configured(attention="native")
    model = build_model(config.model, **make_plan(config, CPU, 1).model_options)
    assert {layer.self_attn.attend for layer in model.model.layers} == {attention.native}


def test_loss(monkeypatch) -> None:
    missing = kernels.unavailable()
    assert make_plan(configured(), CPU, 1).loss == ("chunked" if missing else "native")
    assert make_plan(configured(loss="chunked"), CPU, 1).loss == "chunked"
    assert make_plan(configured(loss="full"), CPU, 1).loss == "full"
    with pytest.raises(BadInput, match="z-loss"):
        make_plan(configured(loss="linear", z_loss=0.1), CPU, 1)
    with monkeypatch.context() as patched, pytest.raises(BadInput, match="65,504"):
        insert_cards([CARDS["T4"]], put=patched.setattr)
        make_plan(configured(loss="linear", precision="fp16"), torch.device("cuda", 0), 1)
    monkeypatch.setattr(kernels, "unavailable", lambda: "no compiler")
    assert make_plan(configured(), CPU, 1).loss == "chunked"
    with pytest.raises(BadInput, match="no compiler"):
        make_plan(configured(loss="native"), CPU, 1)


def test_memory_counts_the_loss_that_is_chosen() -> None:
    precision = choose_precision("fp32", CPU)[0]
    chosen = make_plan(configured(), CPU, 1).loss
    auto, named = (memory_of(configured(loss=loss), CPU, precision, 1, recompute=False) for loss in ("auto", chosen))
    assert auto == named


def test_a_smaller_budget_recomputes_then_shrinks_then_refuses() -> None:
    precision = choose_precision("fp32", CPU)[0]
    need = {
        (micro, again): memory_of(configured(), CPU, precision, micro, recompute=again).total
        for micro in (1, 2, 4, 8)
        for again in (False, True)
    }
    for micro in (1, 2, 4, 8):
        chosen = make_plan(configured(memory=need[micro, False]), CPU, 1)
        assert (chosen.micro_batch, chosen.recompute) == (micro, False)
    chosen = make_plan(configured(memory=need[1, False] - 1), CPU, 1)
    assert chosen.recompute and need[chosen.micro_batch, True] < need[1, False]
    assert any(reason.startswith("memory: ") for reason in chosen.reasons)
    asked = make_plan(configured(memory=need[8, True], micro_batch=8), CPU, 1)
    assert (asked.micro_batch, asked.recompute) == (8, True)
    with pytest.raises(BadInput, match="not enough"):
        make_plan(configured(memory=need[1, True] - 1), CPU, 1)


def test_a_gpu_gets_the_largest_micro_batch_that_the_estimate_puts_in_half_of_its_memory(monkeypatch) -> None:
    gpu = torch.device("cuda")
    insert_cards([CARDS["4090"]], put=monkeypatch.setattr)
    precision = choose_precision("bf16", gpu)[0]
    for micro in (1, 2, 4, 8):
        estimate = partial(memory_of, configured(), gpu, precision)
        memory = estimate(micro, recompute=False)
        half = memory.total - memory.process
        for short, expected in ((0, micro), (1, max(1, micro // 2))):
            insert_cards([Card("NVIDIA L4", 2 * (half - short), (8, 9))], put=monkeypatch.setattr)
            assert plan._micro_batch(configured(), 8, gpu_of(gpu), estimate) == expected
    with pytest.raises(BadInput, match=r"(?s)3 does not divide the 8 sequences.*1, 2, 4, 8"):
        plan._micro_batch(configured(micro_batch=3), 8, gpu_of(gpu), memory_of)


def on_card(monkeypatch, card: str, preset: str = "smollm2-135m", *overrides: str) -> plan.Plan:
    """The plan of a preset on a GPU."""
    gpu = torch.device("cuda", 0)
    insert_cards([CARDS[card]], put=monkeypatch.setattr)
    return make_plan(resolve_batch(configuration.build_config(preset, list(overrides)), gpu), gpu, 1)


needs_windows = pytest.mark.skipif(torch.__version__ < "2.13", reason="varlen_attn of torch 2.10 has no windows")


@pytest.mark.parametrize(("card", "overrides", "attention", "reason"), [
    ("H100", [], "sdpa", "flash kernel"),
    pytest.param("H100", ["data.mask_documents=true"], "varlen", "documents end to end", marks=needs_windows),
    ("4090", ["training.precision=bf16-pure"], "sdpa", "flash kernel"),
    ("4090", ["training.precision=fp32"], "expanded", "needs 16 bits"),
    ("T4", [], "expanded", "Tesla T4 has no flash kernel"),
    ("T4", ["data.mask_documents=true"], "expanded", "Tesla T4 has no flash kernel"),
    ("T4", ["training.attention=sdpa"], "sdpa", "as asked"),
])  # fmt: skip
def test_attention_on_every_card(monkeypatch, card, overrides, attention, reason) -> None:
    chosen = on_card(monkeypatch, card, "smollm2-135m", *overrides)
    (line,) = (line for line in chosen.reasons if line.startswith("attention: "))
    assert chosen.attention == attention and line.startswith(f"attention: {attention} (") and reason in line


@pytest.mark.parametrize(("card", "preset", "micro", "line"), [
    (CARDS["T4"], "seed-recipe", 1, "about 4.81 of 15.66 GB (state 2.42, activations 1.32, head 1.07)"),
    (Card("Quadro RTX 5000", 16 * 10**9, (7, 5)), "smollm2-135m", 2,
     "about 7.14 of 16.00 GB (state 2.42, activations 2.64, head 2.08)"),
    (CARDS["4090"], "smollm2-135m", 4, "about 11.43 of 25.39 GB (state 2.42, activations 4.91, head 4.10)"),
    (CARDS["H100"], "smollm2-135m", 16, "about 26.21 of 85.02 GB (state 2.42, activations 19.63, head 4.16)"),
    (CARDS["H100"], "smollm2-135m", 32, "about 37.61 of 85.02 GB (state 2.42, activations 30.95, head 4.23)"),
])  # fmt: skip
def test_memory_by_part(monkeypatch, card, preset, micro, line) -> None:
    """The estimate that the rehearsal holds against the bytes that a step keeps."""
    monkeypatch.setitem(CARDS, "this", card)
    compiled = "on" if micro == 32 else "off"
    chosen = on_card(monkeypatch, "this", preset, f"training.compile={compiled}")
    assert chosen.micro_batch == micro and f"memory: {line}" in chosen.reasons


def test_packed_documents_without_the_varlen_kernel(monkeypatch) -> None:
    monkeypatch.setattr(attention, "varlen_unavailable", lambda: "torch 2.9 has no varlen_attn")
    chosen = on_card(monkeypatch, "H100", "smollm2-135m", "data.mask_documents=true")
    assert chosen.attention == "expanded" and any("torch 2.9 has no varlen_attn" in line for line in chosen.reasons)
    insert_cards([CARDS["T4"]], put=monkeypatch.setattr)
    with pytest.raises(BadInput, match="varlen attention is not available: Tesla T4 has no flash kernel"):
        make_plan(configured(attention="varlen", precision="fp16"), torch.device("cuda", 0), 1)


def test_recomputed_activations_give_the_same_gradients() -> None:
    config = configured()
    tokens = torch.arange(16)[None]
    gradients = []
    for again in (False, True):
        model = build_model(config.model, seed=0, recompute=again)
        model(tokens).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


def test_memory_counts_the_copy_of_an_asynchronous_save_and_is_printed_as_it_was_read() -> None:
    precision = choose_precision("fp32", CPU)[0]
    config = configuration.build_config("pocket", ["training.memory=2GB", "checkpoint.asynchronous=true"])
    waiting = configuration.build_config("pocket", ["checkpoint.asynchronous=false"])
    with_copy, without = (memory_of(c, CPU, precision, 1, recompute=False) for c in (config, waiting))
    assert with_copy.total - without.total == with_copy.saving == with_copy.weights + with_copy.moments
    (reason,) = (reason for reason in make_plan(config, CPU, 1).reasons if reason.startswith("memory: "))
    assert "of 2.00 GB" in reason


@pytest.mark.parametrize("lora", [0, 16])
def test_tuning_leaves_a_tenth_of_its_memory_where_it_can(lora: int) -> None:
    """The peak of SmolLM2-135M was up to 12% above the estimate."""
    settings = ["data.format=chat", f"lora.r={lora}", "data.sequence_length=512", "training.tokens_per_step=4096",
                "checkpoint.asynchronous=false"]  # fmt: skip
    config = configuration.build_config("smollm2-135m", settings)
    planned, stays = make_plan(config, CPU, 1), 2e9 if lora else 4e9
    assert planned_memory(config, planned).total <= 0.9 * stays
    assert f" of {stays / 1e9:.2f} GB" in " ".join(planned.reasons)
    least = memory_of(config, CPU, planned.precision, 1, recompute=True).total
    given = config.with_keys("training", memory=least)  # too little for a margin
    assert planned_memory(given, make_plan(given, CPU, 1)).total == least
    with pytest.raises(BadInput, match="not enough"):
        make_plan(config.with_keys("training", memory=least - 1), CPU, 1)


def test_configuration_reads_sizes() -> None:
    for text, amount in (("6GB", 6 * 10**9), ("6GiB", 6 << 30), ("auto", "auto")):
        assert configuration.build_config("pocket", [f"training.memory={text}"]).training.memory == amount


def test_any_number_of_ranks_gets_a_share() -> None:
    config = configured(micro_batch=8)
    chosen = make_plan(config, CPU, 3)
    assert (chosen.sequences, chosen.micro_batch) == (3, 3)  # eight sequences: 3, 3 and 2
    assert any("3 processes × at most 1 micro-batch × 3 sequences" in reason for reason in chosen.reasons)
    assert make_plan(config, CPU, 2).micro_batch == 4
    with pytest.raises(BadInput, match=r"(?s)8 sequences, too few for 9 processes.*Start at most 8"):
        make_plan(config, CPU, 9)
