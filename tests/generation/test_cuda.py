"""The runner of a GPU: on one where there is one, else its step eagerly on a CPU, and the sampler for a whole batch."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import filtered
from test_sampler import chi_square_limit
from tiny_llama import SHAPES, make_model

from smolforge.errors import RunFailed
from smolforge.generation import Engine, SamplingParams, bench
from smolforge.generation.runners.cuda import (
    FREQUENCY,
    MIN_P,
    PRESENCE,
    REPETITION,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIFORM,
    CudaRunner,
    StaticCache,
    sample_batch,
)  # fmt: skip
from smolforge.generation.runners.module import ModuleRunner
from smolforge.generation.sampler import Sampler, uniform
from smolforge.generation.sequence import ScheduledChunk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def engines(tokenizer, shape="plain", **options):
    """The same model run as on a GPU, and by the plain module."""
    model = make_model(shape).to(DEVICE)
    return Engine(CudaRunner(model, "fp32"), tokenizer, **options), Engine(ModuleRunner(model), tokenizer, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_static_step_computes_what_the_module_computes(shape):
    model = make_model(shape).to(DEVICE)
    runner, plain = CudaRunner(model, "fp32"), ModuleRunner(model)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 400, (n,), generator=generator).tolist() for n in (5, 130, 31, 200)]
    caches, theirs = ([kind.new_cache(256) for _ in texts] for kind in (runner, plain))
    for one, other, text in zip(caches, theirs, texts, strict=True):
        runner.forward([ScheduledChunk(one, text[:-1], 0, 0)])
        plain.forward([ScheduledChunk(other, text[:-1], 0, 0)])
    positions = torch.tensor([[len(text) - 1] for text in texts], device=DEVICE)
    cache = StaticCache(runner.memory, positions, keys=256)
    with torch.no_grad():
        tokens = torch.tensor([[text[-1]] for text in texts], device=DEVICE)
        logits = model(tokens, positions=positions, cache=cache)[:, 0].cpu()
    chunks = [ScheduledChunk(c, t[-1:], len(t) - 1, 1) for c, t in zip(theirs, texts, strict=True)]
    torch.testing.assert_close(logits, plain.forward(chunks), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_is_read_as_the_module_reads_it(shape):
    """In chunks of every length, behind others, and whatever the text before it left in the shared slot."""
    model = make_model(shape).to(DEVICE)
    runner, plain = CudaRunner(model, "fp32"), ModuleRunner(model)
    generator = torch.Generator().manual_seed(1)
    for lengths in ([1], [16], [17, 1], [100, 40], [64, 3, 60], [129]):
        one, other, start = runner.new_cache(256), plain.new_cache(256), 0
        runner._prompt_memory.fill_(torch.inf)
        for length, logits in zip(lengths, [0] * (len(lengths) - 1) + [1], strict=True):
            tokens = torch.randint(0, 400, (length,), generator=generator).tolist()
            ours = runner.forward([ScheduledChunk(one, tokens, start, logits)])
            theirs = plain.forward([ScheduledChunk(other, tokens, start, logits)])
            assert ours.shape == theirs.shape == (logits, model.config.vocab_size)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            start += length
        torch.testing.assert_close(one.memory[:, :, :start], other.memory[:, :, :start], rtol=1e-4, atol=1e-4)
        assert not one.memory[:, :, start : runner.positions].any()
        # Where the logits of all tokens are wanted, the module goes on from the same slot.
        ours, theirs = (
            kind.forward([ScheduledChunk(cache, [5, 6, 7], start, 3)])
            for kind, cache in ((runner, one), (plain, other))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


SETTINGS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=1.0, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=30, max_tokens=35),
    SamplingParams(temperature=1.3, min_p=0.05, top_p=1.0, max_tokens=25, repetition_penalty=1.4),
    SamplingParams(temperature=1.0, frequency_penalty=0.7, presence_penalty=0.4, max_tokens=50, n=2),
    SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=40),
    SamplingParams(temperature=1.0, max_tokens=20, logprobs=2),
    SamplingParams(temperature=1.0, max_tokens=20, logit_bias={7: 3.0}),
    SamplingParams(temperature=1.0, max_tokens=20, typical_p=0.8),
    SamplingParams(temperature=1.0, max_tokens=20, min_tokens=10, stop_token_ids=tuple(range(50))),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_setting_writes_what_the_host_writes(shape, tokenizer):
    """Requests come and go in a batch of five; each text is that of the plain module with the host's sampler."""
    ours, theirs = engines(tokenizer, shape, max_batch=5)
    chance, requests = random.Random(3), []
    wanted = [(SETTINGS[i % len(SETTINGS)], i) for i in range(30)]
    prompts = [[chance.randrange(400) for _ in range(chance.randrange(1, 60))] for _ in wanted]
    for (params, seed), prompt in zip(wanted, prompts, strict=True):
        params = SamplingParams(**{**vars(params), "seed": seed})
        requests.append((ours.add(prompt, params), theirs.add(prompt, params)))
        for _ in range(chance.randrange(12)):
            ours.step()
    while ours.busy:
        ours.step()
    while theirs.busy:
        theirs.step()
    for mine, other in requests:
        assert [s.tokens for s in mine.sequences] == [s.tokens for s in other.sequences]
        assert [s.finish_reason for s in mine.sequences] == [s.finish_reason for s in other.sequences]
    assert ours.memory()["cache_reserved"] == 0


def test_the_benchmark_decodes_on_the_device():
    runner = CudaRunner(make_model("plain").to(DEVICE), "fp32")
    assert bench._decode(runner, 2, 3) > 0 and len(runner.memory) == 2


def test_tokens_are_drawn_on_the_device_wherever_they_can_be(tokenizer, monkeypatch):
    engine, _ = engines(tokenizer)
    rows, sampled = [], []
    forward, sample = engine.runner.forward, engine.runner.sample
    monkeypatch.setattr(engine.runner, "forward", lambda chunks: rows.append(len(chunks)) or forward(chunks))
    monkeypatch.setattr(engine.runner, "sample", lambda some: sampled.append(len(some)) or sample(some))
    params = SamplingParams(temperature=1.0, max_tokens=10, n=3, ignore_eos=True, repetition_penalty=1.2)
    list(engine.stream(["hello"], params))
    assert sum(sampled) == 3 * 9 and sum(rows) == 3, "only the prompt's last token runs through the module"


knobs = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.sampled_from([0, 1, 7, 300, 5000]), st.sampled_from([0.1, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.4]), st.sampled_from([1.0, 0.8, 1.3]), st.sampled_from([0.0, 0.6, -0.5]),
    st.sampled_from([0.0, 0.9]),
)  # fmt: skip


def batch(rows, logits, prompts, texts, uniforms):
    """The inputs of `sample_batch` for some settings."""
    inputs = torch.zeros(10, len(rows), dtype=torch.float64)
    order = [TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE]
    inputs[order] = torch.tensor(rows, dtype=torch.float64).T
    inputs[UNIFORM] = torch.tensor(uniforms, dtype=torch.float64)
    in_prompt, written = torch.zeros(logits.shape, dtype=torch.bool), torch.zeros(logits.shape, dtype=torch.int32)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        in_prompt[row, prompt] = True
        for token_id in text:
            written[row, token_id] += 1
    return inputs, in_prompt, written


@settings(max_examples=60, deadline=None)
@given(st.lists(knobs, min_size=1, max_size=6), st.integers(0, 2**31), st.sampled_from([0.5, 3.0, 9.0]))
def test_the_batch_draws_what_the_host_draws(rows, seed, scale):
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    logits = torch.randn(len(rows), 1500, generator=generator) * scale
    before = logits.clone()
    prompts = [[chance.randrange(1500) for _ in range(5)] for _ in rows]
    texts = [[chance.randrange(1500) for _ in range(20)] for _ in rows]
    samplers = []
    for index, (row, prompt, text) in enumerate(zip(rows, prompts, texts, strict=True)):
        t, k, p, m, r, f, o = row
        params = SamplingParams(
            temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r, frequency_penalty=f, presence_penalty=o
        )
        samplers.append(Sampler(params, prompt, seed, index))
        for token_id in text:
            samplers[-1].observe(token_id)
    inputs, in_prompt, written = batch(rows, logits, prompts, texts, [s.uniform(20) for s in samplers])
    expected = [sampler.sample_id(logits[row], 20) for row, sampler in enumerate(samplers)]
    assert sample_batch(logits, inputs, in_prompt, written).tolist() == expected
    assert torch.equal(logits, before)


@pytest.mark.parametrize("row", [(1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0), (0.7, 20, 0.9, 0.02, 1.3, 0.4, 0.1)])
def test_the_batch_draws_from_the_distribution(row):
    draws = 40_000
    logits = torch.randn(1, 90, generator=torch.Generator().manual_seed(3)) * 2
    temperature, top_k, top_p, min_p, *penalties = row
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalties[0],
        frequency_penalty=penalties[1], presence_penalty=penalties[2],
    )  # fmt: skip
    sampler = Sampler(params, [1, 2, 3], seed=11)
    for token_id in (4, 4, 5):
        sampler.observe(token_id)
    expected = filtered(sampler.penalize(logits[0], 3).double(), params).softmax(0).numpy()
    many = logits.expand(draws, -1)
    drawn = sample_batch(
        many,
        *batch([row] * draws, many, [[1, 2, 3]] * draws, [[4, 4, 5]] * draws, [uniform(5, 0, i) for i in range(draws)]),
    )
    counts = np.bincount(drawn.numpy(), minlength=90)
    assert counts[expected == 0].sum() == 0
    likely = expected * draws >= 5
    statistic = ((counts - expected * draws)[likely] ** 2 / (expected * draws)[likely]).sum()
    assert statistic < chi_square_limit(int(likely.sum()))


def test_draws_do_not_depend_on_neighbours():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 500, generator=generator) * 3
    row = (1.0, 0, 0.95, 0.0, 1.0, 0.0, 0.0)
    rows, uniforms, nothing = [row] * 8, [uniform(9, i, 4) for i in range(8)], [[]] * 8
    together = sample_batch(logits, *batch(rows, logits, nothing, nothing, uniforms)).tolist()
    alone = [
        sample_batch(logits[i : i + 1], *batch([row], logits[i : i + 1], [[]], [[]], uniforms[i : i + 1])).item()
        for i in range(8)
    ]
    assert together == alone


@pytest.mark.parametrize("params", SETTINGS[:2])
def test_nan_is_reported(params, tokenizer):
    model = make_model().to(DEVICE)
    engine = Engine(CudaRunner(model, "fp32"), tokenizer)
    request = engine.add("hello", params)
    engine.step()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(RunFailed, match="NaN"):
        while not request.finished:
            engine.step()


def test_slots_are_counted_reused_and_clean(tokenizer):
    model = make_model().to(DEVICE)
    runner = CudaRunner(model, "fp32")
    engine = Engine(runner, tokenizer, max_batch=3, cache_bytes=2 * runner.cache_bytes(1))
    requests = [engine.add([i + 1], SamplingParams(max_tokens=12, ignore_eos=True)) for i in range(5)]
    while engine.busy:
        engine.step()
        assert len(engine.scheduler.running) <= 2 and len(runner.memory) <= 2
    assert all(request.written == 12 for request in requests)
    cache = runner.new_cache(5)
    runner.memory[cache.slot] = torch.inf
    slot = cache.slot
    del cache
    gc.collect()
    again = runner.new_cache(5)
    assert again.slot == slot and not again.memory.any()


def test_texts_are_written_in_and_out_of_inference_mode(tokenizer):
    engine, _ = engines(tokenizer)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with torch.inference_mode():
        inside = [output.text for output in engine.stream(["hello"], params)]
    assert [output.text for output in engine.stream(["hello"], params)] == inside


def test_room_is_made_for_no_more_sequences_than_may_run(tokenizer):
    """Slots double until the batch, or the budget, is full; then one by one."""
    runner = CudaRunner(make_model().to(DEVICE), "fp32")
    for max_batch, slots, most in ((5, 9, 5), (64, 6, 6)):
        engine = Engine(runner, tokenizer, max_batch=max_batch, cache_bytes=slots * runner.cache_bytes(256))
        assert runner.most_caches == most and engine.runner is runner
    caches, sizes = [], []
    for number in range(8):
        caches.append(runner.new_cache(5))
        runner.memory[number] = number + 1
        sizes.append(len(runner.memory))
    assert sizes == [1, 2, 4, 4, 6, 6, 7, 8]
    assert [float(memory.min()) for memory in runner.memory] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_weights_of_the_wanted_precision_are_shared_and_others_copied():
    model = make_model().to(DEVICE)
    assert CudaRunner(model, "fp32").module is model and CudaRunner(model, "fp32").weight_bytes == 0
    runner = CudaRunner(model, "bf16")
    assert runner.weight_bytes == 2 * sum(p.numel() for p in model.parameters())
    assert next(model.parameters()).dtype == torch.float32
