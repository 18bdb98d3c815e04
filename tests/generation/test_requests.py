"""Random requests through one engine: nothing leaks, nothing mixes, the books balance after every step."""

from __future__ import annotations

from typing import ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tiny_llama import make_model

from smolforge.generation import Engine, SamplingParams, scheduler
from smolforge.tokenizer import Tokenizer

MODEL = make_model(context=64)
DRAFT = make_model("one-kv", seed=1, context=32)
TOKENIZER = Tokenizer.train(["the quick brown fox"] * 5, 400)
MAX_BATCH, BUDGET_POSITIONS = 4, 160


class Requests(RuleBasedStateMachine):
    """Adds, cancels and steps; knows what every seeded request must write from running it alone."""

    alone: ClassVar[dict] = {}
    added: ClassVar[int] = 0  # requests of all examples

    @initialize(
        quantize=st.sampled_from(["fp32", None]), draft=st.sampled_from([None, MODEL, DRAFT]), tight=st.booleans()
    )
    def start(self, quantize, draft, tight):
        self.quantize = quantize
        # Memory that is counted late runs out, and sequences are read again.
        scheduler.GROWTH, scheduler.HEADROOM = (8, 0) if tight else (64, 256)
        self.engine = Engine.from_model(
            MODEL, TOKENIZER, quantize=quantize, max_batch=MAX_BATCH, cache_bytes=1 << 40, draft=draft
        )
        if self.engine.speculation and self.engine.speculation.draft:
            self.engine.speculation.cost.bytes_ratio = 0.0  # so that it is asked, at least until it is timed
        pool = self.engine.scheduler.pool
        pool.budget = pool.bytes_for(BUDGET_POSITIONS)
        self.requests, self.seen = {}, {}

    @rule(
        length=st.integers(1, 40), token=st.integers(0, 5), max_tokens=st.integers(0, 20), n=st.integers(1, 3),
        seed=st.integers(0, 2), echo=st.booleans(), logprobs=st.sampled_from([None, 0, 2]),
    )  # fmt: skip
    def add(self, length, token, max_tokens, n, seed, echo, logprobs):
        sampling = SamplingParams(max_tokens=max_tokens, n=n, seed=seed, echo=echo, logprobs=logprobs, temperature=1.0)
        prompt = [token] * (length // 2) + [token + 1] * (length - length // 2)
        request = self.engine.add(prompt, sampling)
        self.requests[request.id] = request
        self.seen[request.id] = []
        Requests.added += 1

    @rule(which=st.integers(0, 9))
    def cancel(self, which):
        # What is drawn must not depend on who is live: speculation goes by measured times, so that can differ.
        live = [request for request in self.requests.values() if not request.finished]
        if live:
            request = live[which % len(live)]
            self.engine.cancel(request)
            assert request.finished and all(choice.cache is None for choice in request.sequences)

    @rule(count=st.integers(1, 8))
    def run(self, count):
        for _ in range(count):
            for step in self.engine.step():
                assert not self.requests[step.request].cancelled, "a cancelled request spoke"
                self.seen[step.request].append(step)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "engine"):
            return
        scheduler, pool = self.engine.scheduler, self.engine.scheduler.pool
        assert len(scheduler.running) <= MAX_BATCH
        assert pool.reserved == sum(choice.cache.used for choice in scheduler.running)
        assert pool.kept == sum(cache.used for _, cache in pool.old)
        assert pool.reserved + pool.kept <= pool.budget
        live = {id(choice) for r in self.requests.values() if not r.finished for choice in r.sequences}
        assert {id(choice) for choice in [*scheduler.running, *scheduler.waiting]} <= live

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.busy:
                break
            self.run(1)
        assert not self.engine.busy, "the engine never came to rest"
        assert self.engine.scheduler.pool.reserved == 0
        for request in self.requests.values():
            if not request.cancelled:
                assert self.seen_of(request) == self.expected(request)

    def seen_of(self, request):
        steps = self.seen[request.id]
        return [
            [(s.token_id, s.text, s.finish_reason, s.prompt) for s in steps if s.index == index]
            for index in range(request.params.n)
        ]

    def expected(self, request):
        key = self.quantize, tuple(request.prompt), repr(request.params)
        if key not in self.alone:
            engine = Engine.from_model(MODEL, TOKENIZER, quantize=self.quantize)
            steps = list(engine.stream([request.prompt], request.params))
            self.alone[key] = [
                [(s.token_id, s.text, s.finish_reason, s.prompt) for s in steps if s.index == index]
                for index in range(request.params.n)
            ]
        return self.alone[key]


def of(examples):
    return settings(
        max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )


Requests.TestCase.settings = of(60)
TestRequests = Requests.TestCase


@pytest.mark.slow
def test_ten_thousand_requests():
    first = Requests.added
    while Requests.added - first < 10_000:
        run_state_machine_as_test(Requests, settings=of(200))
