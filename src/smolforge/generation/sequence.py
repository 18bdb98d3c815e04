"""The data of generation: a request, its sequences, what a step runs of them, and what a step returns.

`StepOutput` is the one object that the command line, the page, the API and training read.
"""

from __future__ import annotations

import collections.abc
import dataclasses
from typing import Any, Literal, NamedTuple

from torch import Tensor

from smolforge.errors import BadInput
from smolforge.generation.sampler import SampledToken, Sampler, describe
from smolforge.generation.sampling_params import SamplingParams
from smolforge.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]
LONGEST_CHARACTER = 4  # bytes in UTF-8; a token has at least one
Prompt = str | collections.abc.Sequence[int]  # text, in which special tokens are only text, or token ids


class StepOutput(NamedTuple):
    """One token of one sequence, or its end.

    `text` is what may now be shown. Joined over the steps of a sequence it is the whole text; it may lag behind the
    tokens (half characters, possible stop strings) and catches up. `finish_reason` is "stop" (end of text, stop string
    or id) or "length" (max_tokens or the context's end).
    """

    request: int  # id of the request; in `Engine.stream` the index of the prompt
    index: int  # of the sequence
    token_id: int | None  # None in a last step that has only text or the end
    text: str
    text_offset: int = 0  # where the text of this token begins, in characters of the sequence's whole text
    logprob: float | None = None  # natural log of the token's probability under the model, where asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, (id, logprob) each, best first
    finish_reason: FinishReason | None = None  # set on the last step of a sequence
    prompt: bool = False  # the token belongs to the prompt (`echo`)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and its settings, as the engine accepted them."""

    id: int  # counts up from 0 in one engine
    prompt: list[int]
    params: SamplingParams
    seed: int  # that of `params`, or the one drawn for it; the same seed gives the same text
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


class Sequence:
    """One continuation of a request: its tokens, how many of them the cache holds, and how it is drawn and shown.

    Args:
        index: 0 <= index < n.
        limit: maximum number of tokens, prompt included: max_tokens or the context.
        stop_token_ids: tokens that end it.
    """

    def __init__(
        self, request: Request, index: int, tokenizer: Tokenizer, limit: int, stop_token_ids: frozenset[int]
    ) -> None:
        self.request, self.index, self.limit, self.stop_token_ids = request, index, limit, stop_token_ids
        self.params = request.params
        self.tokens = list(request.prompt)  # and those that were written
        self.computed = 0  # how many of them have keys and values in the cache
        self.cache: Any = None  # the runner's, while the sequence runs
        self.counted = 0  # positions of it that are counted as used
        self.drafts: Any = None  # what `Speculation` keeps of it
        self.finish_reason: FinishReason | None = None
        self.sampler = Sampler(request.params, request.prompt, request.seed, index, sorted(stop_token_ids))
        self.detokenizer = Detokenizer(StreamDecoder(tokenizer), request.params.stop)
        if not request.params.echo:
            self.detokenizer.skip(request.prompt)
        self._echoed = 0
        self._follows: Tensor | None = None  # the logits of the token after the last echoed one

    @property
    def written(self) -> int:
        """Tokens written so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that the model has to run before the next can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the prompt's own log-probabilities are asked for."""
        return self.params.echo and self.params.logprobs is not None

    def append(self, token: SampledToken) -> StepOutput:
        """Add a drawn token; the output that shows it, or that ends the sequence."""
        offset, reason = self.detokenizer.decoded, None
        self.tokens.append(token.token_id)
        self.sampler.observe(token.token_id)
        if token.token_id in self.stop_token_ids:
            text, reason = "", "length" if self.sampler.cut_off else "stop"
        else:
            text = self.detokenizer.push(token.token_id)
            if not self.detokenizer.stopped and len(self.tokens) >= self.limit:
                reason = "length"
        return self._output(token, text, offset, reason)

    def finish(self, reason: FinishReason) -> StepOutput:
        """End the sequence without another token."""
        return self._output(None, "", self.detokenizer.decoded, reason)

    def echo(self, upto: int, logits: Tensor | None = None, start: int = 0) -> list[StepOutput]:
        """Outputs for the prompt's tokens up to position `upto`, once each; the first has no log-probability.

        Args:
            logits: (tokens, V), row i after the token at position `start` + i; None without logprobs.
        """
        if not self.params.echo:
            return []
        outputs = []
        for at in range(self._echoed, upto):
            token = SampledToken(self.request.prompt[at])
            if logits is not None and self.params.logprobs is not None:
                if self._follows is not None:
                    token = describe(self._follows, token.token_id, self.params.logprobs)
                self._follows = logits[at - start]
            offset, text = self.detokenizer.decoded, self.detokenizer.push_prompt(token.token_id)
            outputs.append(self._output(token, text, offset, None, prompt=True))
        self._echoed = max(self._echoed, upto)
        return outputs

    def _output(
        self, token: SampledToken | None, text: str, offset: int, reason: FinishReason | None, *, prompt: bool = False
    ) -> StepOutput:
        if reason is not None or self.detokenizer.stopped:
            text += self.detokenizer.flush()
            self.finish_reason = reason = "stop" if self.detokenizer.stopped else reason
        where = self.request.id, self.index
        if token is None:
            return StepOutput(*where, None, text, offset, finish_reason=reason)
        return StepOutput(*where, token.token_id, text, offset, token.logprob, token.top_logprobs, reason, prompt)


class Detokenizer:
    """Turns the tokens of one sequence into text that may be shown: whole characters, and never part of a stop string.

    Text that could still become one of the strings `stops` is held back, and returned as soon as it cannot. So the
    parts joined are the whole text before the stop string, or all of it where none came.
    """

    def __init__(self, decoder: StreamDecoder, stops: collections.abc.Sequence[str] = ()) -> None:
        self._decoder, self._stops, self._held = decoder, stops, ""
        self.stopped = False  # a stop string was found; no more text comes
        self.decoded = 0  # characters so far, which is where the text of the next token begins

    def skip(self, prompt: collections.abc.Sequence[int]) -> None:
        """Begin after a prompt that is not shown; a character that it leaves unfinished continues."""
        for token_id in prompt[-LONGEST_CHARACTER:]:
            self._decoder.push(token_id)

    def push_prompt(self, token_id: int) -> str:
        """The text of a token of the prompt, in which stop strings have no effect."""
        return self._count(self._decoder.push(token_id))

    def push(self, token_id: int) -> str:
        """The text that may be shown after this token."""
        return self._release(self._count(self._decoder.push(token_id)))

    def flush(self) -> str:
        """The rest, at the end of the sequence."""
        text = self._release(self._count(self._decoder.flush()))
        rest, self._held = self._held, ""
        return text + rest

    def _count(self, text: str) -> str:
        self.decoded += len(text)
        return text

    def _release(self, text: str) -> str:
        if not self._stops:
            return text
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown
        border = len(self._held) - self._open_prefix()
        shown, self._held = self._held[:border], self._held[border:]
        return shown

    def _open_prefix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            sizes = range(min(len(stop) - 1, len(self._held)), longest, -1)
            longest = next((size for size in sizes if self._held.endswith(stop[:size])), longest)
        return longest


class ScheduledChunk(NamedTuple):
    """Consecutive tokens of one sequence to run: positions start .. start + len(tokens) - 1."""

    cache: Any
    tokens: list[int]
    start: int
    logits: int  # of how many of the last tokens logits are wanted (0 in the middle of a prompt)
    drafted: int = 0  # how many of the last tokens are drafts that the model verifies

    def with_drafts(self, tokens: list[int]) -> ScheduledChunk:
        """This chunk, of whose last token logits are wanted, followed by drafted tokens."""
        count = len(tokens)
        return self._replace(tokens=self.tokens + tokens, logits=1 + count, drafted=count)


Work = list[tuple[Sequence, ScheduledChunk]]  # what one step runs


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids of a prompt, at least one, all below `vocab_size`. A text begins as the tokenizer begins one.

    Raises:
        BadInput: the prompt is empty, or contains something that is not a token id of the model.
    """
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise BadInput("is empty", field="prompt", hint="Give at least one token to begin with.")
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise BadInput(f"token ids are whole numbers from 0 to {vocab_size - 1}, not {token_id!r}", field="prompt")
    return ids
