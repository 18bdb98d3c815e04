"""The runner of a GPU: on a CPU it runs the same functions without graphs, and is held to the plain module here."""

from __future__ import annotations

import gc
import os
import random
import sys
from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_runners import TOLERANCE, calm, distance, one_by_one, rounded, tokens, whole
from tiny_llama import SHAPES, make_model

from smolforge.errors import BadInput
from smolforge.generation import Engine, SamplingParams
from smolforge.generation import quantize as precisions
from smolforge.generation import runners as choose
from smolforge.generation.kernels import choose_kernels, disagreement
from smolforge.generation.kv_cache import CachePool
from smolforge.generation.paged_attention import PagedKernels
from smolforge.generation.pages import FIRST, PAGE, PagePool
from smolforge.generation.runners.module import ModuleRunner
from smolforge.generation.sequence import ScheduledChunk
from smolforge.generation.static import MOST_ROWS, StaticRunner

TIGHT = {**TOLERANCE, "fp32": 1e-5}


def expected_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_logits_are_those_of_the_rounded_weights(shape, precision):
    model = calm(shape)
    ids = tokens(model)
    expected = expected_of(rounded(model, precision), ids)
    runner = StaticRunner(model, precision)
    assert distance(one_by_one(runner, ids), expected) < TIGHT[precision]
    assert distance(whole(runner, ids), expected) < TIGHT[precision]


def test_past_the_first_bucket_of_lengths():
    model = make_model("odd")
    ids = tokens(model, 200)
    expected = expected_of(model, ids)
    assert distance(one_by_one(StaticRunner(model, "fp32"), ids, prompt=120), expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_and_tokens_in_one_step_do_not_mix(shape):
    """Random steps: some sequences decode, some read prompts, some rest; every logit is that of the sequence alone."""
    model, rng = make_model(shape), random.Random(7)
    runner = StaticRunner(model, "fp32")
    texts = [tokens(model, rng.randint(2, 150), seed) for seed in range(9)]
    expected = [expected_of(model, ids) for ids in texts]
    caches = [runner.new_cache(len(ids)) for ids in texts]
    done = [0] * len(texts)
    while any(at < len(ids) for at, ids in zip(done, texts, strict=True)):
        pieces, rows = [], []
        for i in rng.sample(range(len(texts)), rng.randint(1, len(texts))):
            left = len(texts[i]) - done[i]
            if left:
                count = min(left, rng.choice([1, 1, 1, 2, 7, 40]))
                logits = rng.randint(0, count)
                end = done[i] + count
                pieces.append(ScheduledChunk(caches[i], texts[i][done[i] : end], done[i], logits))
                rows.append(expected[i][end - logits : end])
                done[i] = end
        if pieces:
            logits, right = runner.forward(pieces), torch.cat(rows)
            assert logits.dtype == torch.float32 and logits.shape == right.shape
            assert not len(right) or distance(logits, right) < 1e-5


@pytest.mark.parametrize("count", [1, 3, 5, 64, 70])
def test_rows_that_fill_up_a_batch_touch_nobody(count):
    """Page 0 is filled with large numbers, and only it may change but for the rows that were written."""
    model = calm("plain")
    runner = StaticRunner(model, "fp32")
    texts = [tokens(model, 5 + seed % 3, seed) for seed in range(count)]
    caches = [runner.new_cache(40) for _ in texts]
    runner.forward([ScheduledChunk(c, ids[:-1], 0, 0) for c, ids in zip(caches, texts, strict=True)])
    for layer in runner._pool.layers:
        layer[:PAGE] = 1e4
    before = [layer.clone() for layer in runner._pool.layers]
    logits = runner.forward(
        [ScheduledChunk(c, ids[-1:], len(ids) - 1, 1) for c, ids in zip(caches, texts, strict=True)]
    )
    for ids, row in zip(texts, logits, strict=True):
        assert distance(row, expected_of(model, ids)[-1]) < 1e-5
    written = {int(c.table[0]) * PAGE + len(ids) - 1 for c, ids in zip(caches, texts, strict=True)}
    for old, new in zip(before, runner._pool.layers, strict=True):
        changed = (old != new).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert {row for row in changed if row >= PAGE} == written


def test_what_an_earlier_owner_left_in_a_page_is_never_seen():
    model = calm("plain")
    runner = StaticRunner(model, "fp32")
    cache = runner.new_cache(100)
    for layer in runner._pool.layers:
        layer[PAGE:] = torch.nan
    del cache
    ids = tokens(model, 70)
    assert distance(one_by_one(runner, ids), expected_of(model, ids)) < 1e-5


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, 50])
def test_a_copied_prefix_continues_as_the_original(length):
    model = make_model()
    runner, ids = StaticRunner(model, "fp32"), tokens(model)
    first, second = runner.new_cache(len(ids)), runner.new_cache(200)
    runner.forward([ScheduledChunk(first, ids[:60], 0, 0)])
    second.copy_prefix(first, length)
    del first
    logits = torch.cat([runner.forward([ScheduledChunk(second, [ids[i]], i, 1)]) for i in range(length, 70)])
    assert distance(logits, expected_of(model, ids)[length:70]) < 1e-5


class Recorder:
    """Stands for `Graphs`: a recording is good as long as the memory it was made over stays where it was."""

    def __init__(self, runner) -> None:
        self.layers, self.recorded = runner._pool.layers, {}

    def run(self, function, host):
        places = [layer.data_ptr() for layer in self.layers]
        assert self.recorded.setdefault(host.shape, places) == places, "a recording is replayed over memory that moved"
        return function(host)

    def clear(self):
        self.recorded.clear()


def test_recordings_are_few_and_made_anew_when_the_pages_move():
    model = calm("plain")
    runner = StaticRunner(model, "fp32")
    runner._graphs = recorder = Recorder(runner)
    ids, held = tokens(model, 140), []
    caches = [runner.new_cache(len(ids)) for _ in range(3)]
    for cache in caches:
        runner.forward([ScheduledChunk(cache, ids[:120], 0, 0)])
    for at in range(120, 140):
        logits = runner.forward([ScheduledChunk(cache, ids[at : at + 1], at, 1) for cache in caches])
        assert distance(logits, expected_of(model, ids)[at].expand(3, -1)) < 1e-5
        if at == 130:
            assert {tuple(shape) for shape in recorder.recorded} == {(4, 2 + 4), (4, 2 + 8)}
            held.append(runner.new_cache(FIRST * PAGE))  # more than there is: the memory grows
    assert {tuple(shape) for shape in recorder.recorded} == {(4, 2 + 8)}


@pytest.mark.parametrize("capacity", [1, PAGE - 1, PAGE, PAGE + 1, 200])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_caches_take_what_was_said(capacity, precision):
    runner = StaticRunner(make_model("odd"), precision)
    before = runner._pool.leased
    cache = runner.new_cache(capacity)
    c = runner.config
    position = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (4 if precision == "fp32" else 2)
    assert cache.capacity >= capacity and cache.nbytes == runner.cache_bytes(capacity) == position * cache.capacity
    assert (runner._pool.leased - before) * runner._pool.page_bytes == cache.nbytes
    held = sum(layer.nbytes for layer in runner._pool.layers)
    assert runner._pool.nbytes == held


def test_weights_are_counted():
    model = make_model("one-kv", vocab_size=1024)
    numbers = sum(p.numel() for p in model.parameters())
    tables = 2 * 256 * model.config.head_dim * 4
    for precision, size in (("fp32", 4), ("bf16", 2), ("int8", 1)):
        held = StaticRunner(model, precision).weight_bytes
        assert numbers * size <= held <= numbers * size * 1.08 + tables, precision


class Leases(RuleBasedStateMachine):
    """Leases, drops and copies through `cache.CachePool`: no page is lost or held twice, no written row is disturbed."""

    def __init__(self):
        super().__init__()
        self.pages = PagePool(2, 1, 2, torch.float32, torch.device("cpu"))
        cost = lambda n: self.pages.pages_for(n) * self.pages.page_bytes  # noqa: E731
        self.pool = CachePool(self.pages.lease, cost, 200 * self.pages.page_bytes, keep=2)
        self.held = []  # (cache, the number all its rows hold)
        self.peak = 0

    @rule(capacity=st.integers(1, 40 * PAGE), mark=st.integers(1, 10**6))
    def take(self, capacity, mark):
        if self.pool.has_room(capacity):
            cache = self.pool.allocate(capacity)
            rows = self.pages.rows(cache.table)
            assert all(not layer[rows].any() for layer in self.pages.layers), "a new cache is not empty"
            self.write(cache, mark)
            self.held.append((cache, mark))

    @rule(which=st.integers(0, 100), keep=st.booleans())
    def give_back(self, which, keep):
        if self.held:
            cache, _ = self.held.pop(which % len(self.held))
            self.pool.free(cache, [1, 2] if keep else [])

    @rule(a=st.integers(0, 100), b=st.integers(0, 100))
    def copy(self, a, b):
        if self.held:
            (source, mark), at = self.held[a % len(self.held)], b % len(self.held)
            target = self.held[at][0]
            if target is not source and target.capacity <= source.capacity:
                target.copy_prefix(source, target.capacity)
                self.held[at] = target, mark

    @rule()
    def forget(self):
        self.pool.clear()

    def write(self, cache, mark):
        for layer in self.pages.layers:
            layer[self.pages.rows(cache.table)] = mark

    @invariant()
    def nothing_is_lost(self):
        kept = [cache for _, cache in self.pool._old]
        caches = [cache for cache, _ in self.held] + kept
        pages = [int(page) for cache in caches for page in cache.table]
        assert len(pages) == len(set(pages)) == self.pages.leased and 0 not in pages
        assert self.pages.leased * self.pages.page_bytes == self.pool.reserved + self.pool.kept <= self.pool.budget
        assert not set(pages) & set(self.pages._free)
        assert len(pages) + len(self.pages._free) == max(self.pages._pages - 1, 0)
        self.peak = max(self.peak, len(pages))
        assert self.pages.nbytes <= max(FIRST, 1.5 * (1 + self.peak)) * self.pages.page_bytes
        for cache, mark in self.held:
            rows = self.pages.rows(cache.table)
            assert all((layer[rows] == mark).all() for layer in self.pages.layers)


Leases.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLeases = Leases.TestCase


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_writes_what_it_writes_with_the_module(shape, tokenizer):
    model = make_model(shape)
    prompts = [tokens(model, length, seed) for seed, length in enumerate([1, 5, 60, 2, 100, 33, 7])]
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, n=2)
    texts = []
    for runner in (ModuleRunner(model), StaticRunner(model, "fp32")):
        budget = 5 * runner.cache_bytes(140)  # not all at once
        engine = Engine(runner, tokenizer, max_batch=6, cache_bytes=budget)
        written = {}
        for step in engine.stream(prompts, sampling):
            written.setdefault((step.request, step.index), []).append(step.token_id)
        texts.append(written)
    assert texts[0] == texts[1] and len(texts[0]) == 14 and len({tuple(t) for t in texts[0].values()}) == 7
    gc.collect()
    assert runner._pool.leased == 0 and engine.scheduler.pool.reserved == 0


def test_a_cancelled_request_gives_its_pages_back(tokenizer):
    runner = StaticRunner(make_model(), "fp32")
    engine = Engine(runner, tokenizer)
    request = engine.add(list(range(50)), SamplingParams(max_tokens=100, n=3))
    engine.step()
    assert runner._pool.leased > 0
    engine.cancel(request)
    assert runner._pool.leased == 0


def test_a_gpu_gets_bf16_and_int8_for_int4_and_is_told():
    assert precisions.choose("auto", 10, "cuda")[0] == "bf16"
    precision, reason = precisions.choose("int4", 10**9, "cuda")
    assert precision == "int8" and "int4" in reason and "GPU" in reason
    assert precisions.choose("int4", 10**9, "cpu")[0] == "int4"
    with pytest.raises(BadInput, match="int3"):
        precisions.choose("int3", 10**9, "cuda")


def interpreted_kernels():
    """Triton's kernels, run by its interpreter where TRITON_INTERPRET=1; the test skips elsewhere."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1 to run Triton's kernels on a CPU")
    pytest.importorskip("triton")
    from smolforge.generation.triton_kernels import TritonKernels

    return TritonKernels(wide=True)


@pytest.mark.parametrize("programs", [1, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted_triton_kernels_agree_with_torch(shape, programs, monkeypatch):
    kernels, config = interpreted_kernels(), make_model(shape).config
    monkeypatch.setattr("smolforge.generation.triton_kernels.PROGRAMS", programs)
    error = disagreement(kernels, config, torch.float32, torch.device("cpu"), batches=(1, 3))
    assert error < 0.004  # the plain product has int8's scales in bf16


def test_interpreted_triton_kernels_write_the_same():
    model, kernels = calm("odd"), interpreted_kernels()
    ids = tokens(model, 45)
    runner = StaticRunner(model, "fp32", kernels=kernels)
    assert distance(one_by_one(runner, ids), expected_of(model, ids)) < 1e-5


def test_kernels_that_fail_or_are_wrong_are_not_used(monkeypatch):
    """On a pretended GPU: the plain kernels remain, and the reason is told."""
    config, cuda, module = make_model().config, torch.device("cuda"), ModuleType("triton_kernels")
    monkeypatch.setitem(sys.modules, "smolforge.generation.triton_kernels", module)
    kernels, reason = choose_kernels(config, "bf16", cuda)
    assert type(kernels) is PagedKernels and "ImportError" in reason
    module.TritonKernels = Wrong
    monkeypatch.setattr("smolforge.generation.kernels.disagreement", lambda *_: 0.5)
    kernels, reason = choose_kernels(config, "bf16", cuda)
    assert type(kernels) is PagedKernels and "50.0%" in reason
    monkeypatch.setattr("smolforge.generation.kernels.disagreement", lambda *_: 0.001)
    assert type(choose_kernels(config, "bf16", cuda)[0]) is Wrong
    assert type(choose_kernels(config, "fp32", cuda)[0]) is PagedKernels


class Wrong(PagedKernels):
    """Kernels with one mistake each."""

    def __init__(self, mistake: str = "") -> None:
        self.mistake = mistake

    def swiglu(self, gate_up):
        return super().swiglu(gate_up) * (1.1 if self.mistake == "swiglu" else 1)

    def add_norm(self, x, delta, weight, eps):
        return super().add_norm(x, None if self.mistake == "add" else delta, weight, eps)

    def over_pages(self, rotary, memories, inputs):
        return super().over_pages(rotary, memories, inputs.clamp(max=3) if self.mistake == "pages" else inputs)


@pytest.mark.parametrize("mistake", ["swiglu", "add", "pages"])
def test_disagreement_is_seen(mistake):
    config, cpu = make_model().config, torch.device("cpu")
    assert disagreement(PagedKernels(), config, torch.bfloat16, cpu) == 0
    assert disagreement(Wrong(mistake), config, torch.bfloat16, cpu) > 0.05


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_replayed_graphs_compute_what_is_computed_without(shape, precision):
    """On a GPU: also after the pages moved, in batches of several sizes, and over several lengths."""
    model = calm(shape).to("cuda")
    eager, graphs = StaticRunner(model, precision, graphs=False), StaticRunner(model, precision)
    texts = [tokens(model, 150, seed) for seed in range(MOST_ROWS + 3)]
    for count in (1, 3, MOST_ROWS + 3):  # the last needs more than the first allocation
        caches = [[runner.new_cache(150) for _ in range(count)] for runner in (eager, graphs)]
        for start, end in ((0, 100), *((at, at + 1) for at in range(100, 150))):
            rows = [
                runner.forward(
                    [ScheduledChunk(c, ids[start:end], start, 1) for c, ids in zip(own, texts, strict=False)]
                )
                for runner, own in zip((eager, graphs), caches, strict=True)
            ]
            assert distance(rows[1], rows[0]) < TIGHT[precision], (count, start)
    assert graphs._graphs is not None and 2 <= len(graphs._graphs) <= 8
    expected = torch.stack([expected_of(model.cpu(), ids)[-1] for ids in texts])
    assert distance(rows[1], expected) < 3 * TIGHT["int8"]


@needs_cuda
def test_a_llama_on_a_gpu_gets_graphs():
    runner, decisions = choose.select_runner(make_model().to("cuda"))
    assert isinstance(runner, StaticRunner) and "CUDA graphs, bf16" in " ".join(decisions)
