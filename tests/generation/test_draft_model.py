"""A draft model changes how many steps a text takes, and nothing else; what it cannot help, it leaves alone."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import drop_kept, make_model

from smolforge import cli, kernels
from smolforge.checkpoint.format import write_model
from smolforge.errors import BadInput, RunFailed
from smolforge.generation import Engine, SamplingParams
from smolforge.generation.draft_model import PairedCache
from smolforge.generation.kv_cache import TensorCache
from smolforge.generation.sampler import Sampler
from smolforge.generation.scheduler import MOST_DRAFTED as MOST
from smolforge.generation.sequence import ScheduledChunk
from smolforge.generation.speculative import ENOUGH, FORGET, DraftCost, fastest, speed
from smolforge.tokenizer import Tokenizer

CHANCE = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=60, seed=3, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def native_step():
    """Drafts need rows that do not depend on their batch."""
    try:
        kernels.library()
    except kernels.NativeUnavailable as error:
        pytest.skip(str(error))


def drafted(tokenizer, draft, *, cost=0.0, ngrams=False, model=None, **options):
    """An engine with a draft that is thought to cost so much, whatever the clock says."""
    engine = Engine.from_model(model or make_model(), tokenizer, quantize="fp32", draft=draft, **options)
    assert engine.speculation and engine.speculation.draft
    ledger = engine.speculation.cost
    ledger.bytes_ratio, ledger.draft_took = cost, lambda rows, seconds: None
    if not ngrams:
        drafts_of = engine.speculation.drafts_of

        def without_ngrams(sequence):
            drafts = drafts_of(sequence)
            drafts.ngram.propose = lambda running, room: []
            return drafts

        engine.speculation.drafts_of = without_ngrams
    return engine


@pytest.fixture(scope="module")
def near():
    """The plain model with a little noise: right often, and not always."""
    module = make_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.001 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture(scope="module")
def engines(tokenizer, near):
    """The same model with a draft (and lookups), with a draft of a short context, and alone."""
    return (
        drafted(tokenizer, near, ngrams=True),
        drafted(tokenizer, make_model("one-kv", seed=5, context=40)),
        Engine.from_model(make_model(), tokenizer, quantize="fp32", speculate=False),
    )


def steps_of(engine, prompts, params):
    return sorted(
        ((s.request, s.index, s.token_id, s.text, s.logprob, s.top_logprobs, s.finish_reason)
         for s in engine.stream(prompts, params)),
        key=lambda step: step[:2],
    )  # fmt: skip


def run(engine, request):
    steps = 0
    while not request.finished:
        engine.step()
        steps += 1
    return steps


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 399), min_size=1, max_size=6), st.integers(1, 6), st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**31), st.sampled_from([1.0, 1.3]), st.sampled_from([0.0, 0.8]), st.sampled_from([0.0, -0.5]),
    st.integers(1, 60), st.sampled_from([1, 3]), st.sampled_from([0, 9]), st.sampled_from([None, 2]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_the_text_is_the_same_to_the_last_bit(
    engines, unit, times, temperature, seed, repetition, presence, frequency, tokens, n, least, logprobs, echo, clear
):
    params = SamplingParams(
        temperature=temperature, seed=seed, max_tokens=tokens, repetition_penalty=repetition,
        presence_penalty=presence, frequency_penalty=frequency, n=n, stop=("qu",), stop_token_ids=(5, 6, 7),
        min_tokens=min(least, tokens), logprobs=logprobs, echo=echo,
    )  # fmt: skip
    prompts = [unit * times, [7, *unit], [9]]
    *with_drafts, alone = engines
    expected = steps_of(alone, prompts, params)
    for engine in with_drafts:
        if clear:  # otherwise this text may begin with rows kept from another, of the model or of both
            drop_kept(engine)
        engine.speculation.rate.value = 0.9  # or failures of other texts would silence it
        assert steps_of(engine, prompts, params) == expected
        assert engine.memory()["cache_reserved"] == 0


def test_the_drafts_above_were_used(engines):
    for engine in engines[:2]:
        engine.speculation.proposed = engine.speculation.accepted = 0
        engine.speculation.rate.value = 0.9
        for seed in range(5):
            list(engine.stream([[5, 6, seed]], SamplingParams(temperature=1.0, seed=seed, ignore_eos=True)))
        assert engine.speculation.proposed > 0
    assert engines[0].speculation.accepted > 0.2 * engines[0].speculation.proposed


@pytest.mark.parametrize(
    "penalties", [{}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": 0.7}]
)
def test_the_same_model_is_always_right(tokenizer, penalties):
    engine = drafted(tokenizer, make_model())
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=100, seed=1, ignore_eos=True, **penalties)
    request = engine.add([5, 6, 7, 8], params)
    assert run(engine, request) <= 16  # 99 tokens at nine a step, once the rate has risen so far
    assert request.written == 100
    assert engine.speculation.accepted == engine.speculation.proposed > 80


def test_the_end_is_drafted_and_nothing_behind_it(tokenizer):
    engine = drafted(tokenizer, make_model())
    for seed in range(5):
        request = engine.add(
            [5, 6, 7], SamplingParams(temperature=1.0, seed=seed, stop_token_ids=tuple(range(100, 130)), stop="qu")
        )
        run(engine, request)
        assert request.sequences[0].finish_reason == "stop"
    assert engine.speculation.proposed > 20
    assert engine.speculation.proposed - engine.speculation.accepted <= 5, "stop strings are not known to the draft"


def check_against_a_fresh_draft(engine, monkeypatch):
    """Every token must be what the draft draws after reading the text from its start; the lengths of its chunks."""
    draft, lengths = engine.speculation.draft, []
    forward, propose = draft.runner.forward, draft.propose

    def checked(asked):
        drafts = propose(asked)
        for sequence, found in drafts.items():
            tokens = list(sequence.tokens)
            for token in found[:1]:
                chunk = ScheduledChunk(draft.runner.new_cache(len(tokens)), tokens, 0, 1)
                assert token == sequence.sampler.sample_id(forward([chunk])[0], sequence.written)
        return drafts

    monkeypatch.setattr(draft, "propose", checked)
    monkeypatch.setattr(draft.runner, "forward", lambda ps: lengths.extend(len(p.tokens) for p in ps) or forward(ps))
    return lengths


def test_wrong_drafts_leave_no_trace_in_the_draft_s_cache(tokenizer, near, monkeypatch):
    engine = drafted(tokenizer, near)
    lengths = check_against_a_fresh_draft(engine, monkeypatch)
    run(engine, engine.add([5, 6, 7], CHANCE))
    assert 0 < engine.speculation.accepted < engine.speculation.proposed
    assert [length for length in lengths if length > 2] == [3], "no row is run twice"


def test_drafts_that_did_not_become_the_text_are_forgotten():
    cache = PairedCache(*(TensorCache(make_model().config, 20, torch.float32, torch.device("cpu")) for _ in range(2)))
    cache.read, cache.drafted = 3, [7, 8, 9]
    cache.accept([1, 2, 3, 7, 8, 5, 5, 5, 5])
    assert (cache.read, cache.drafted) == (5, [])
    cache.accept([1, 2, 3, 7])  # the last token is always run again
    assert cache.read == 3


def test_rows_that_the_draft_never_read_are_not_copied(tokenizer, near, monkeypatch):
    engine = drafted(tokenizer, near, cost=0.9)
    first = engine.add(list(range(1, 40)), CHANCE)
    run(engine, first)
    assert engine.speculation.proposed == 0 and engine.memory()["cache_kept"]
    engine.speculation.cost.bytes_ratio = 0.0
    lengths = check_against_a_fresh_draft(engine, monkeypatch)
    again = engine.add(first.sequences[0].tokens[:50], CHANCE)
    run(engine, again)
    assert engine.speculation.proposed > 0 and lengths[0] == 50


def test_a_step_that_failed_is_taken_again(tokenizer, near, monkeypatch):
    engine = drafted(tokenizer, near)
    alone = Engine.from_model(make_model(), tokenizer, quantize="fp32", speculate=False)
    expected = alone.add([5, 6, 7], CHANCE)
    run(alone, expected)
    check_against_a_fresh_draft(engine, monkeypatch)
    request = engine.add([5, 6, 7], CHANCE)
    forward, turns = engine.runner.forward, iter(range(100))

    def unreliable(chunks):
        if next(turns) % 3 == 2:
            raise RuntimeError("no luck")
        return forward(chunks)

    monkeypatch.setattr(engine.runner, "forward", unreliable)
    while not request.finished:
        with contextlib.suppress(RuntimeError):
            engine.step()
    assert request.sequences[0].tokens == expected.sequences[0].tokens and engine.speculation.proposed > 0


def test_a_low_rate_is_tried_again(tokenizer):
    engine = drafted(tokenizer, make_model())
    request = engine.add([5, 6, 7], SamplingParams(temperature=1.0, max_tokens=100, seed=1, ignore_eos=True))
    engine.speculation.drafts_of(request.sequences[0]).model_rate.value = 0.2
    assert 15 < run(engine, request) < 50


def test_both_models_are_timed_and_prompts_are_not(tokenizer, monkeypatch):
    engine = Engine.from_model(make_model(), tokenizer, quantize="fp32", draft=make_model())
    cost = engine.speculation.cost
    cost.bytes_ratio, rows = 0.01, {"draft": [], "model": []}
    for who in rows:
        took = getattr(cost, f"{who}_took")
        monkeypatch.setattr(
            cost, f"{who}_took", lambda n, s, who=who, took=took: rows[who].append((n, s)) or took(n, s)
        )
    for i in range(3):
        run(engine, engine.add([5 + i] * 50, CHANCE))
    assert cost.value != 0.01
    assert all(1 <= n <= 2 and s > 0 for n, s in rows["draft"]) and len(rows["draft"]) >= ENOUGH
    assert all(1 <= n <= 1 + MOST and s > 0 for n, s in rows["model"]) and len(rows["model"]) >= ENOUGH


def test_sequences_of_a_step_are_drafted_together(tokenizer):
    engine = drafted(tokenizer, make_model())
    calls = []
    forward = engine.speculation.draft.runner.forward
    engine.speculation.draft.runner.forward = lambda chunks: calls.append(len(chunks)) or forward(chunks)
    requests = [engine.add([5, 6, 7 + i], CHANCE) for i in range(4)]
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert all(request.written == 60 for request in requests)
    assert max(calls) == 4 and len(calls) <= 1 + steps * MOST
    assert sum(calls) / len(calls) > 3, "most calls run all four"
    assert engine.speculation.accepted == engine.speculation.proposed > 150 and steps < 20


def test_sequences_of_a_prompt_copy_its_rows(tokenizer):
    engine = drafted(tokenizer, make_model())
    rows = []
    forward = engine.speculation.draft.runner.forward
    engine.speculation.draft.runner.forward = lambda chunks: (
        rows.extend(len(p.tokens) for p in chunks) or forward(chunks)
    )
    request = engine.add(
        list(range(1, 150)), SamplingParams(temperature=1.0, max_tokens=9, n=3, seed=1, ignore_eos=True)
    )
    run(engine, request)
    assert [count for count in rows if count > 2] == [149], "the prompt is read once"
    assert engine.speculation.accepted == engine.speculation.proposed > 0


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 30])
def test_drafts_never_pass_the_limit(tokenizer, tokens):
    engine = drafted(tokenizer, make_model())
    request = engine.add([5, 6], SamplingParams(temperature=1.0, max_tokens=tokens, seed=2, ignore_eos=True))
    forward = engine.runner.forward

    def watched(chunks):
        for chunk in chunks:
            assert chunk.start + len(chunk.tokens) < 2 + tokens
        return forward(chunks)

    engine.runner.forward = watched
    calls, read = [], engine.speculation.draft.runner.forward
    engine.speculation.draft.runner.forward = lambda chunks: calls.append(1) or read(chunks)
    run(engine, request)
    assert request.written == tokens
    assert (engine.speculation.proposed > 0) == (tokens > 2) == bool(calls), (
        "with no room for a token the prompt is not read either"
    )


def test_drafting_stops_where_the_draft_s_context_ends(tokenizer):
    short = make_model(context=24)
    short.config = short.config.model_copy(update={"max_position_embeddings": 24})
    engine = drafted(tokenizer, short)
    ends = []
    forward = engine.speculation.draft.runner.forward

    def watched(chunks):
        ends.extend(chunk.start + len(chunk.tokens) for chunk in chunks)
        return forward(chunks)

    engine.speculation.draft.runner.forward = watched
    request = engine.add([5, 6, 7], CHANCE)
    run(engine, request)
    assert request.written == 60 and max(ends) == 24
    assert engine.speculation.accepted == engine.speculation.proposed
    long = engine.add(list(range(1, 40)), CHANCE)
    ends.clear()
    run(engine, long)
    assert not ends, "a prompt that does not fit is not read"
    both = engine.runner.cache_bytes(63) + engine.speculation.draft.runner.cache_bytes(24)
    assert engine.scheduler.pool.bytes_for(63) == both
    assert any("its own context of 24" in line for line in engine.decisions)


def test_every_byte_of_both_caches_is_counted_and_given_back(tokenizer, near):
    engine = drafted(tokenizer, near)
    both = [engine.runner, engine.speculation.draft.runner]
    need = sum(runner.cache_bytes(63) for runner in both)
    alone = Engine.from_model(make_model(), tokenizer, quantize="fp32")
    assert engine.memory()["weights"] == sum(runner.weight_bytes for runner in both)
    assert engine.memory()["draft_weights"] == both[1].weight_bytes == alone.memory()["weights"]
    assert alone.memory()["draft_weights"] == 0
    first, second = engine.add([5, 6, 7], CHANCE), engine.add([5, 6, 8], CHANCE)
    engine.step(), engine.step()
    cache = first.sequences[0].cache
    assert engine.memory()["cache_reserved"] == 2 * need == 2 * (cache.model.memory.nbytes + cache.draft.memory.nbytes)
    engine.cancel(first)
    assert first.sequences[0].cache is None and engine.memory()["cache_reserved"] == need
    run(engine, second)
    assert engine.memory()["cache_reserved"] == 0
    assert engine.memory()["cache_kept"] == 2 * need
    drop_kept(engine)
    assert engine.memory()["cache_kept"] == 0


def test_the_budget_holds_both_caches(tokenizer, near):
    need = drafted(tokenizer, near).scheduler.pool.bytes_for(63)
    engine = drafted(tokenizer, near, cache_bytes=2 * need - 1)
    requests = [engine.add([5, 6, 7 + i], CHANCE) for i in range(3)]
    while engine.busy:
        engine.step()
        assert len(engine.scheduler.running) <= 1
    assert all(request.written == 60 for request in requests)
    with pytest.raises(BadInput, match="cache"):
        drafted(tokenizer, near, cache_bytes=need - 1).add([5, 6, 7], CHANCE)


def test_a_draft_that_is_never_right_falls_silent(tokenizer):
    engine = drafted(tokenizer, make_model("odd", seed=9))
    for i in range(4):
        run(engine, engine.add([5, 6, 7 + i], CHANCE))
    assert 0 < engine.speculation.proposed < 40


def test_a_draft_that_costs_too_much_is_not_asked(tokenizer):
    engine = drafted(tokenizer, make_model(), cost=0.8)
    run(engine, engine.add([5, 6, 7], CHANCE))
    assert engine.speculation.proposed == 0
    plain = Engine.from_model(make_model(), tokenizer, quantize="fp32", draft=make_model())
    assert any(
        "1.00 of the bytes" in line and "not faster even if all 8 drafted tokens are accepted" in line
        for line in plain.decisions
    )
    assert run(plain, plain.add([5, 6, 7], CHANCE)) >= 30  # written all the same


def test_of_ngrams_and_draft_model_the_better_is_taken(tokenizer):
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, logit_bias={9: 100.0})

    def drafts_of_the_model(cost, ngram_rate):
        engine = drafted(tokenizer, make_model(), cost=cost, ngrams=True)
        drawn = []
        propose = engine.speculation.draft.propose
        engine.speculation.draft.propose = lambda asked: drawn.append(len(asked)) or propose(asked)
        request = engine.add([9] * 8, params)
        engine.speculation.drafts_of(request.sequences[0]).ngram.rate.value = ngram_rate
        engine.speculation.drafts_of(request.sequences[0]).model_rate.value = 0.8
        run(engine, request)
        assert engine.speculation.accepted > 70
        return sum(drawn)

    assert drafts_of_the_model(0.1, 0.9) == 1, "only the prompt was read: the text repeats itself for nothing"
    assert drafts_of_the_model(0.1, 0.3) > 5


def test_other_runners_do_without_and_say_why(tokenizer, monkeypatch):
    live = Engine.from_model(make_model(), tokenizer, draft=make_model())
    assert live.speculation is None
    assert any(line.startswith("draft: ") and "not used" in line and "plain PyTorch" in line for line in live.decisions)
    off = Engine.from_model(make_model(), tokenizer, quantize="fp32", speculate=False, draft=make_model())
    assert off.speculation is None and any("does not speculate" in line for line in off.decisions)
    assert off.memory()["draft_weights"] == 0
    with pytest.raises(BadInput, match="tokenizer"):
        Engine.from_model(make_model(), tokenizer, draft=make_model(), draft_tokenizer=Tokenizer.train(["other"], 300))


def test_a_draft_of_other_tokens_is_refused(tokenizer):
    def error(draft, other):
        with pytest.raises(BadInput) as caught:
            Engine.from_model(make_model(), tokenizer, quantize="fp32", draft=draft, draft_tokenizer=other)
        assert caught.value.field == "draft" and caught.value.hint
        return caught.value.message

    other = Tokenizer.train(["some other text altogether"] * 9, 290)
    sizes = f"it has {other.vocab_size} tokens and the model's {tokenizer.vocab_size}"
    assert other.vocab_size != tokenizer.vocab_size and sizes in error(make_model(), other)
    vocabulary = json.loads(tokenizer.backend.to_str())
    words = vocabulary["model"]["vocab"]
    one, two = sorted(words, key=words.get)[-2:]
    words[one], words[two] = words[two], words[one]
    from tokenizers import Tokenizer as Backend

    swapped = Tokenizer(Backend.from_str(json.dumps(vocabulary)))
    message = error(make_model(), swapped)
    assert f"token {words[two]} is {two!r} in it and {one!r} in the model's" in message
    assert "writes 512 token ids and the model 400" in error(make_model(vocab_size=512), tokenizer)


def test_a_broken_draft_is_named(tokenizer):
    broken = make_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    engine = drafted(tokenizer, broken)
    request = engine.add([5, 6, 7], CHANCE)
    with pytest.raises(RunFailed, match="draft"):
        run(engine, request)
    engine.cancel(request)
    assert engine.memory()["cache_reserved"] == 0


def test_drawing_ahead_leaves_the_sampler_as_it_is():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for params in (
        SamplingParams(repetition_penalty=1.5, seed=1),
        SamplingParams(frequency_penalty=1.0, presence_penalty=1.0),
    ):
        sampler, told = Sampler(params, [1, 2], 1), Sampler(params, [1, 2], 1)
        ahead = sampler.fork()
        for token_id in (7, 8, 7):
            ahead.observe(token_id)
            told.observe(token_id)
        fresh = Sampler(params, [1, 2], 1)
        for index in range(40):
            assert sampler.sample_id(logits, index) == fresh.sample_id(logits, index)
            assert ahead.sample_id(logits, index) == told.sample_id(logits, index)


def test_times_win_over_bytes_and_are_forgotten():
    cost = DraftCost(0.1)
    for _ in range(ENOUGH):
        cost.model_took(1, 0.010)
        assert cost.value == 0.1
        cost.draft_took(5, 0.010)  # five rows cost as much as two steps of one
    assert cost.value == pytest.approx(0.5)
    cost.draft_took(1, 9.0)  # an interruption
    assert cost.value == pytest.approx(0.5)
    for _ in range(FORGET + 1):
        cost.model_took(1, 0.010)
    assert cost.value == 0.1


@given(st.floats(0, 1), st.floats(0.01, 2))
def test_the_number_of_drafts_is_the_fastest(rate, share):
    count = fastest(rate, share)
    assert all(speed(rate, count, share) >= speed(rate, other, share) for other in range(MOST + 1))
    assert speed(rate, 0, share) == 1
    assert (count == 0) or rate > share


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A model, a smaller one of its tokenizer, and one of another tokenizer."""
    place = tmp_path_factory.mktemp("models")
    for name, module, words in (
        ("model", make_model("one-kv"), tokenizer),
        ("small", make_model(), tokenizer),
        ("other", make_model(), Tokenizer.train(["quite another text, quite another text"] * 9, 320)),
    ):
        (place / name).mkdir()
        write_model(place / name, module.config, module.state_dict(), words, card="# Tiny\n")
    return place


def test_the_command_line(folders, capsys):
    def write(*words):
        assert cli.run(["generate", str(folders / "model"), "hello", "--seed", "3", "--max-tokens", "40", *words]) == 0
        return capsys.readouterr()

    plain = write()
    told = write("--draft", str(folders / "small"))
    assert told.out == plain.out
    assert f"draft: {folders / 'small'}, native C++" in told.err and "draft:" not in plain.err
    itself = write("--draft", str(folders / "model"))
    assert itself.out == plain.out
    assert "(the model itself)" in itself.err and "disabled: not faster" in itself.err


@pytest.mark.parametrize("draft, words", [("other", "tokenizer is not the model's"), ("nowhere", "no such directory")])
def test_the_command_line_names_a_bad_draft(folders, capsys, draft, words):
    assert cli.run(["generate", str(folders / "model"), "hello", "--draft", str(folders / draft)]) == 2
    message = capsys.readouterr().err
    assert "error: --draft: " in message and words in message and "Traceback" not in message
