"""Requests in, steps out: equal to transformers, equal among any batch mates, and strict about bad input."""

from __future__ import annotations

import collections
import functools

import pytest
import torch
from tiny_llama import SHAPES, as_transformers, make_model

from smolforge.errors import BadInput, RunFailed
from smolforge.generation import Engine, SamplingParams
from smolforge.generation.runners.cpu import CpuRunner
from smolforge.generation.runners.cuda import CudaRunner
from smolforge.generation.runners.module import ModuleRunner

PATHS = [
    ModuleRunner,
    *(functools.partial(kind, precision="fp32") for kind in (CpuRunner, CudaRunner)),
]
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def collect(steps):
    """{(request, choice): (token ids, text, finish reason)} of a stream."""
    out: dict = {}
    for step in steps:
        ids, text, reason = out.get((step.request, step.index), ([], "", None))
        assert reason is None, "a step came after the last one"
        ids = ids + ([step.token_id] if step.token_id is not None and not step.prompt else [])
        out[step.request, step.index] = ids, text + step.text, step.finish_reason
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS, ids=["module", "cpu", "cuda"])
def test_greedy_equals_transformers(shape, path, tokenizer):
    model = make_model(shape)
    engine = Engine(path(model), tokenizer)
    oracle = as_transformers(model)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 400, (n,), generator=generator).tolist() for n in (1, 2, 7, 31, 32, 33, 100, 190)]
    ours = collect(engine.stream(prompts, GREEDY))
    for index, prompt in enumerate(prompts):
        theirs = oracle.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :]
        assert ours[index, 0][0] == theirs.tolist()
    assert len({token for ids, _, _ in ours.values() for token in ids}) > 20, "equal repetitions prove little"
    assert engine.memory()["cache_reserved"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_greedy_equals_transformers_at_length(seed, tokenizer):
    model = make_model(list(SHAPES)[seed % 3], seed=seed, context=1024)
    oracle = as_transformers(model)
    prompt = torch.randint(0, 400, (1 + 37 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
    theirs = oracle.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False)[0, len(prompt) :]
    for path in PATHS:
        engine = Engine(path(model), tokenizer)
        ours = collect(engine.stream([prompt], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)))
        assert ours[0, 0][0] == theirs.tolist()


@pytest.mark.parametrize("quantize", [None, "fp32", "int8", "int4"])
def test_seeded_text_is_the_same_among_fifteen_mates_who_come_and_go(quantize, tokenizer):
    engine = Engine.from_model(make_model(), tokenizer, quantize=quantize, max_batch=16)
    wanted = SamplingParams(seed=42, max_tokens=70, temperature=1.2, logprobs=2, ignore_eos=True)
    prompt = tokenizer.encode("once upon a time in a galaxy " * 3)
    alone = list(engine.stream([prompt], wanted))
    generator = torch.Generator().manual_seed(9)

    def number(below):
        return int(torch.randint(below, (), generator=generator))

    mates, request, mine = [], None, []
    for turn in range(400):
        while len(mates) < 15:
            ids = torch.randint(0, 400, (1 + number(120),), generator=generator).tolist()
            if number(3) == 0:
                ids = prompt[: 1 + number(len(prompt))] + ids[:5]  # a common prefix, to be copied
            mates.append(engine.add(ids, SamplingParams(max_tokens=1 + number(40), seed=number(1000), n=1 + number(2))))
        if turn == 7:
            request = engine.add(prompt, wanted)
        steps = engine.step()
        mine += [step for step in steps if request is not None and step.request == request.id]
        if number(4) == 0:
            engine.cancel(mates[number(len(mates))])
        mates = [mate for mate in mates if not mate.finished]
        if request is not None and request.finished:
            break
    assert [(s.token_id, s.text, s.logprob, s.top_logprobs, s.finish_reason) for s in mine] == [
        (s.token_id, s.text, s.logprob, s.top_logprobs, s.finish_reason) for s in alone
    ]


def test_choices_differ_and_repeat(tokenizer):
    engine = Engine.from_model(make_model(), tokenizer, quantize="fp32")
    sampling = SamplingParams(seed=3, n=4, max_tokens=20, temperature=1.0, top_p=1.0)
    first, second = (collect(engine.stream(["hello world"], sampling)) for _ in range(2))
    assert first == second and len({tuple(ids) for ids, _, _ in first.values()}) == 4


def test_without_a_seed_one_is_drawn_and_kept(tokenizer):
    engine = Engine.from_model(make_model(), tokenizer)
    a, b = (engine.add("hello", SamplingParams(max_tokens=1)) for _ in range(2))
    assert a.seed != b.seed


def test_stop_strings_across_tokens(tokenizer):
    engine = Engine.from_model(make_model(), tokenizer, quantize="fp32")
    sampling = SamplingParams(seed=5, max_tokens=80, temperature=1.0, ignore_eos=True)
    text = collect(engine.stream(["hello"], sampling))[0, 0][1]
    for start in (3, 10, 20):
        stop = text[start : start + 4]
        steps = list(engine.stream(["hello"], SamplingParams(**{**vars(sampling), "stop": stop})))
        assert "".join(step.text for step in steps) == text[: text.index(stop)]
        assert steps[-1].finish_reason == "stop"


def test_ends(tokenizer):
    model = make_model()
    engine = Engine.from_model(model, tokenizer)
    greedy = collect(engine.stream(["hello"], GREEDY))[0, 0][0]
    at = next(i for i, t in enumerate(greedy) if t not in greedy[:i] and i > 2)
    stopped = collect(engine.stream(["hello"], SamplingParams(temperature=0, stop_token_ids=(greedy[at],))))[0, 0]
    assert stopped[0] == greedy[: at + 1] and stopped[2] == "stop"
    assert tokenizer.decode(greedy[:at]) == stopped[1], "the stop token is not shown"
    ended = Engine.from_model(model, tokenizer, eos_ids=[greedy[at]])
    assert collect(ended.stream(["hello"], SamplingParams(temperature=0)))[0, 0] == stopped
    waited = collect(ended.stream(["hello"], SamplingParams(temperature=0, min_tokens=at + 5)))[0, 0]
    assert len(waited[0]) >= at + 5
    long = collect(engine.stream([[5] * 250], SamplingParams(temperature=0, ignore_eos=True)))[0, 0]
    assert len(long[0]) == 6 and long[2] == "length", "the context ends at 256"


def test_a_text_that_any_token_ends_has_no_least_length(tokenizer):
    engine = Engine.from_model(make_model(), tokenizer)
    every = tuple(range(engine.vocab_size))
    with pytest.raises(BadInput, match="every token ends the text"):
        engine.add("hello", SamplingParams(min_tokens=2, stop_token_ids=every, top_k=5))
    others = tuple(i for i in every if i != 5)
    written = collect(engine.stream(["hello"], SamplingParams(min_tokens=2, stop_token_ids=others, top_k=5)))[0, 0]
    assert written[0][:2] == [5, 5] and not engine.busy


def test_max_tokens_one_and_zero(tokenizer):
    engine = Engine.from_model(make_model(), tokenizer)
    assert len(list(engine.stream(["hello"], SamplingParams(max_tokens=1)))) == 1
    steps = list(engine.stream(["hello world"], SamplingParams(max_tokens=0, echo=True)))
    assert "".join(step.text for step in steps) == "hello world" and steps[-1].finish_reason == "length"
    steps = list(engine.stream([[7] * 256], SamplingParams(max_tokens=0)))
    assert [step.finish_reason for step in steps] == ["length"], "a full context is a prompt one may echo"


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_with_logprobs(max_tokens, tokenizer):
    model = make_model("plain", context=1024)
    engine = Engine.from_model(model, tokenizer)
    prompt = torch.randint(1, 400, (600,), generator=torch.Generator().manual_seed(0)).tolist()  # several chunks
    steps = list(engine.stream([prompt], SamplingParams(max_tokens=max_tokens, echo=True, logprobs=2, n=2)))
    with torch.no_grad():
        logs = model(torch.tensor([prompt]))[0].log_softmax(-1)
    for choice in (0, 1):
        echoed = [step for step in steps if step.prompt and step.index == choice]
        assert [step.token_id for step in echoed] == prompt and echoed[0].logprob is None
        expected = [float(logs[i, t]) for i, t in enumerate(prompt[1:])]
        assert [step.logprob for step in echoed[1:]] == pytest.approx(expected, abs=1e-3)
        assert all(len(step.top_logprobs) == 2 for step in echoed[1:])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"), ([], "empty"), ([400], "400"), ([-1], "-1"), ([True], "True"), ([1.5], "1.5"),
        ([1] * 256, "256 tokens"), ([1] * 300, "at most 255"),
    ],
)  # fmt: skip
def test_bad_prompts(prompt, words, tokenizer):
    engine = Engine.from_model(make_model(), tokenizer)
    with pytest.raises(BadInput) as caught:
        engine.add(prompt)
    assert caught.value.field == "prompt" and words in str(caught.value)
    assert not engine.busy


def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(tokenizer):
    engine = Engine.from_model(make_model(), tokenizer)
    with pytest.raises(BadInput):
        list(engine.stream(["hello", ""]))
    assert not engine.busy


def test_ids_outside_the_vocabulary(tokenizer):
    engine = Engine.from_model(make_model(), tokenizer)
    for sampling in (SamplingParams(stop_token_ids=(400,)), SamplingParams(logit_bias={400: 1.0})):
        with pytest.raises(BadInput, match="400"):
            engine.add("hello", sampling)


def test_a_request_larger_than_the_whole_cache_is_refused(tokenizer):
    engine = Engine.from_model(make_model(), tokenizer, cache_bytes=10_000)
    with pytest.raises(BadInput, match="bytes of cache"):
        engine.add("hello", SamplingParams(max_tokens=200))


def test_waiting_for_memory_is_no_error(tokenizer):
    model = make_model()
    need = Engine.from_model(model, tokenizer).runner.cache_bytes(50)
    engine = Engine.from_model(model, tokenizer, cache_bytes=2 * need)
    out = collect(engine.stream([[3]] * 7, SamplingParams(max_tokens=40, ignore_eos=True, seed=1)))
    assert len(out) == 7 and all(len(ids) == 40 for ids, _, _ in out.values())


@pytest.mark.parametrize("quantize", ["fp32", None])
@pytest.mark.parametrize("more", [{"temperature": 1.0}, {"temperature": 0, "echo": True, "logprobs": 2, "n": 2}])
def test_texts_without_a_limit_share_the_memory_that_they_use(quantize, more, tokenizer, monkeypatch):
    """Four texts that might fill the context, and memory for two such: all run at once, and none changes."""
    model = make_model(context=256)
    params = SamplingParams(max_tokens=200, ignore_eos=True, seed=1, **more)
    prompts = [[5 + i, *range(1, 40)] for i in range(4)]
    alone = [collect(Engine.from_model(model, tokenizer, quantize=quantize).stream([p], params)) for p in prompts]
    need = Engine.from_model(model, tokenizer, quantize=quantize).scheduler.pool.bytes_for(256)
    monkeypatch.setattr("smolforge.generation.scheduler.HEADROOM", 0)
    engine = Engine.from_model(model, tokenizer, quantize=quantize, cache_bytes=2 * need)
    pauses, pause = [], engine.scheduler._pause
    monkeypatch.setattr(engine.scheduler, "_pause", lambda one: pauses.append(one) or pause(one))
    requests, seen = [engine.add(prompt, params) for prompt in prompts], collections.defaultdict(list)
    most = 0
    while engine.busy:
        for step in engine.step():
            seen[step.request, step.index].append(step)
        most = max(most, len(engine.scheduler.running))
    assert pauses and most >= 4, "sequences join as long as there is memory for what is written"
    for request, expected in zip(requests, alone, strict=True):
        for index in range(params.n):
            steps = seen[request.id, index]
            assert [s.token_id for s in steps if s.token_id is not None and not s.prompt] == expected[0, index][0]
            assert sum(s.prompt for s in steps) == (40 if params.echo else 0)
            assert None not in [s.logprob for s in steps[1:]] or not params.echo


def test_logits_that_are_no_numbers_are_said(tokenizer):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    for sampling in (SamplingParams(), SamplingParams(temperature=0)):
        with pytest.raises(RunFailed, match="NaN"):
            list(Engine.from_model(model, tokenizer).stream(["hello"], sampling))


def test_closing_a_stream_frees_everything(tokenizer):
    engine = Engine.from_model(make_model(), tokenizer)
    stream = engine.stream(["hello", "world"], SamplingParams(n=3))
    next(stream)
    assert engine.memory()["cache_reserved"] > 0
    stream.close()
    assert not engine.busy and engine.memory()["cache_reserved"] == 0


def test_prompts_are_read_in_chunks_between_others_tokens(tokenizer):
    engine = Engine.from_model(make_model(context=2048), tokenizer, quantize="fp32")
    stream = engine.add([3], SamplingParams(max_tokens=50, ignore_eos=True, seed=0))
    engine.step()
    engine.add([4] * 1500, SamplingParams(max_tokens=5))
    turns = [len([s for s in engine.step() if s.request == stream.id]) for _ in range(6)]
    assert turns == [1] * 6, "the running stream gets its token in every step"
