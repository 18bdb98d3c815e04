"""The nouns of generation: a request, its sequences while they grow, and the steps that everyone reads.

`StepOutput` is the one typed object that the command line, the page, the API and training share.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from smolforge.generation.detokenizer import TextStream
from smolforge.generation.echo import Echo
from smolforge.generation.kv_cache import Cache
from smolforge.generation.sampler import NO_TOP, Sampler
from smolforge.generation.sampling_params import SamplingParams
from smolforge.generation.speculative import NgramDraft, Rate

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """One token of one sequence, or its end.

    Attributes:
        request: id of the request; in `Engine.stream` the index of the prompt.
        index: of the continuation, 0 <= index < n.
        token_id: the token, or None in a last step that brings only text or the end.
        text: what may now be shown. Joined over the steps of a sequence it is the whole text; it may lag behind
            the tokens (half characters, possible stop strings) and catches up.
        logprob: natural log of the token's probability under the model, where asked for.
        top_logprobs: the likeliest tokens, (id, logprob) each, best first.
        finish_reason: set on the last step of a sequence: "stop" (end of text, stop string or id) or "length"
            (max_tokens or the context's end).
        prompt: the token belongs to the prompt (`echo`).
    """

    request: int
    index: int
    token_id: int | None
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = NO_TOP
    finish_reason: FinishReason | None = None
    prompt: bool = False


@dataclasses.dataclass(frozen=True)
class ScheduledChunk:
    """Consecutive tokens of one sequence to run: positions start .. start + len(tokens) - 1.

    Attributes:
        logits: how many of the last rows want logits (0 in the middle of a prompt).
        guessed: how many of the last tokens are guesses that the model is to judge.
    """

    cache: Cache
    tokens: list[int]
    start: int
    logits: int
    guessed: int = 0

    def guess(self, tokens: list[int]) -> ScheduledChunk:
        """This chunk, whose last row wants logits, with guesses of the tokens behind it."""
        count = len(tokens)
        return dataclasses.replace(self, tokens=self.tokens + tokens, logits=1 + count, guessed=count)


@dataclasses.dataclass(eq=False)
class Sequence:
    """One continuation: its tokens, how many of them the cache holds, and how it is drawn and shown."""

    request: Request
    index: int
    tokens: list[int]  # prompt and what was written
    sampler: Sampler
    text: TextStream
    limit: int  # most tokens, prompt included: max_tokens or the context
    stop_token_ids: frozenset[int]  # tokens that end it
    computed: int = 0  # tokens whose keys and values are in the cache
    cache: Any = None
    finish_reason: FinishReason | None = None
    echo: Echo | None = None
    lookup: NgramDraft | None = None  # guesses tokens from the text, where that keeps it bitwise
    draft_rate: Rate | None = None  # how often a draft model's guesses of this text are right, where there is one

    @property
    def written(self) -> int:
        """Tokens written so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that still have to go through the model before the next can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the prompt's own log-probabilities are asked for."""
        return self.request.params.echo and self.request.params.logprobs is not None


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what is wanted of it, as the engine took it.

    Attributes:
        id: counts up from 0 in one engine.
        prompt: token ids.
        seed: the request's own, or the one drawn for it; the same seed gives the same text.
        cancelled: nothing more will come.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    cancelled: bool = False

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended, or the request was cancelled."""
        return self.cancelled or all(sequence.finish_reason for sequence in self.sequences)

    @property
    def written(self) -> int:
        """Tokens written so far, over all sequences; the end-of-text token counts."""
        return sum(sequence.written for sequence in self.sequences)
