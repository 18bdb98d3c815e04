"""A small model that guesses what a large one will write (Leviathan et al. 2022; Chen et al. 2023).

It draws from its own logits with the sampler's own arithmetic and the uniform number of the very position, so the
two models meet the same chance: where they believe the same, they draw the same token, at any temperature. The text
stays that of the large model, token for token. The price: where beliefs are flat, a small difference moves the draw to
a neighbour, so fewer guesses are right than the papers' acceptance by chance allows, which would change the text.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smolforge.errors import BadInput, RunFailed
from smolforge.generation.kv_cache import Cache, common_prefix
from smolforge.generation.runners import Runner, select_runner
from smolforge.generation.scheduler import CHUNK, ROWS
from smolforge.generation.sequence import ScheduledChunk, Sequence
from smolforge.generation.speculative import MOST, Cost, Rate, fastest, row_share

if TYPE_CHECKING:
    from smolforge.tokenizer import Tokenizer

FEW_TOKENS = 2  # chunks of a step that is timed: the last token, and the guess before it that was never run


class DraftModel:
    """Guesses for all sequences of a step together. The sequences' caches are `PairedCache`s.

    Args:
        runner: of the draft.
        bytes_ratio: of its weights to the model's.

    Attributes:
        cost: of one of its steps, in steps of the model.
        rate: running share of its guesses that were right, over all texts; new texts begin with it.
    """

    def __init__(self, runner: Runner, bytes_ratio: float) -> None:
        self.runner, self.cost, self.rate = runner, Cost(bytes_ratio), Rate()
        self.context = runner.config.max_position_embeddings

    def worthwhile(self, rate: float, running: int) -> int:
        """How many guesses pay for texts of such a rate, in a step of so many sequences; 0 where none does."""
        return fastest(rate, self.share(running))

    def share(self, running: int) -> float:
        """What a guess costs, in units of a token's own cost: a row of the model's step and a step of the draft."""
        return row_share(running) + self.cost.value

    def room(self, sequence: Sequence) -> int:
        """Most guesses that fit the draft's context; below 0 where even the text does not."""
        return self.context - len(sequence.tokens) + 1 if len(sequence.tokens) <= self.context else -1

    def propose(self, asked: list[tuple[Sequence, int]]) -> dict[Sequence, list[int]]:
        """Read on in each text, and guess its next tokens where it has been read to its end.

        Args:
            asked: sequences with the most guesses of each; 0 only reads.

        Raises:
            RunFailed: the logits are not numbers.
        """
        chunks, drawing = self._read(asked)
        guesses: dict[Sequence, list[int]] = {sequence: [] for sequence, _ in drawing}
        samplers = {sequence: sequence.sampler.ahead() for sequence, _ in drawing}
        while chunks:
            began, rows = time.perf_counter(), sum(len(chunk.tokens) for chunk in chunks)
            timed = bool(drawing) and all(len(chunk.tokens) <= FEW_TOKENS for chunk in chunks)
            logits = self.runner.forward(chunks)
            if len(logits) and torch.isnan(logits.max()):
                raise RunFailed("the draft model's logits are not numbers", hint="Go on without --draft.")
            chunks, drawn, drawing = [], drawing, []
            for row, (sequence, count) in enumerate(drawn):
                found, sampler, cache = guesses[sequence], samplers[sequence], _paired(sequence)
                token_id = sampler.choose(logits[row], sequence.written + len(found))
                found.append(token_id)
                if len(found) < count and token_id not in sequence.stop_token_ids:
                    sampler.observe(token_id)
                    chunks.append(ScheduledChunk(cache.draft, [token_id], len(sequence.tokens) + len(found) - 1, 1))
                    drawing.append((sequence, count))
                    cache.guesses.append(token_id)
            if timed:
                self.cost.draft_took(rows, time.perf_counter() - began)
        return guesses

    def _read(self, asked: list[tuple[Sequence, int]]) -> tuple[list[ScheduledChunk], list[tuple[Sequence, int]]]:
        """The chunks that bring the draft's caches up to date, as many rows as a step has; who draws from them."""
        chunks, drawing, rows = [], [], 0
        for sequence, count in asked:
            cache = _paired(sequence)
            cache.settle(sequence.tokens)
            tokens = sequence.tokens[cache.read : cache.read + CHUNK]
            if rows and rows + len(tokens) > ROWS:
                break
            draws = count > 0 and cache.read + len(tokens) == len(sequence.tokens)
            chunks.append(ScheduledChunk(cache.draft, tokens, cache.read, int(draws)))
            if draws:
                drawing.append((sequence, count))
            cache.read += len(tokens)
            rows += len(tokens)
        return chunks, drawing


def _paired(sequence: Sequence) -> PairedCache:
    assert isinstance(sequence.cache, PairedCache)
    return sequence.cache


def select_draft(
    module: Any, tokenizer: Tokenizer, runner: Runner, of: Tokenizer, *, name: str = "the draft model",
    threads: int | None = None,
) -> tuple[DraftModel | None, list[str]]:  # fmt: skip
    """A draft model beside a runner, and what was decided; None where its guesses could change the text.

    Args:
        module: the draft, a model of `model/`.
        tokenizer: the draft's.
        runner: of the model it drafts for.
        of: the model's tokenizer.
        name: of the draft, for people.
        threads: of the draft's runner.

    Raises:
        BadInput: the draft's token ids are not the model's.
    """
    check_same_tokens(tokenizer, of)
    size, theirs = module.config.vocab_size, runner.config.vocab_size
    if size != theirs:
        raise BadInput(
            f"it writes {size:,} token ids and the model {theirs:,}, though their tokenizers agree",
            field="draft",
            hint="Both need the same vocab_size in their config.json.",
        )
    if not runner.batch_invariant:
        return None, [
            f"draft: {name} is not used; on this runner ({runner.name}) a row's last bits depend on the rows beside "
            "it, so guesses could change the text"
        ]
    # Its precision touches how often it is right, never the text, so it is always the fastest that keeps the quality.
    mine, decisions = select_runner(module, "auto", threads=threads)
    ratio = _weight_bytes(mine) / _weight_bytes(runner)
    draft = DraftModel(mine, ratio)
    what = f"draft: {name}, {mine.name}; its weights have {ratio:.2f} of the bytes of the model's"
    if not draft.worthwhile(1.0, 1):
        what += f", so even if all of up to {MOST} guesses were right it could not pay, and it is not asked"
    else:
        what += "; it guesses while that pays, and what is written stays the same"
    if draft.context < runner.config.max_position_embeddings:
        what += f"; up to its own context of {draft.context:,} tokens"
    return draft, [what, *(f"draft {line}" for line in decisions if not line.startswith("runner"))]


def check_same_tokens(draft: Tokenizer, model: Tokenizer) -> None:
    """Check that the ids of both mean the same tokens.

    Raises:
        BadInput: they do not; says where.
    """
    mine, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (draft, model))
    if mine == theirs:
        return
    if len(mine) != len(theirs):
        what = f"it has {len(mine):,} tokens and the model's {len(theirs):,}"
    else:
        first = min(token_id for _, token_id in mine.items() ^ theirs.items())
        what = f"token {first} is {draft.token_text(first)!r} in it and {model.token_text(first)!r} in the model's"
    raise BadInput(
        f"its tokenizer is not the model's: {what}",
        field="draft",
        hint="A draft must have been trained with the model's own tokenizer: the same tokens under the same ids.",
    )


def _weight_bytes(runner: Any) -> int:
    """Bytes of the weights that a step reads, whoever holds them."""
    return runner.weight_bytes or sum(parameter.nbytes for parameter in runner.module.parameters())


class PairedCache:
    """The cache of one sequence, and that of its draft, which may lag behind or run ahead.

    Attributes:
        read: positions whose rows the draft's cache holds for certain.
        guesses: tokens behind `read` whose rows it holds too, if they turn out to be the text's.
    """

    def __init__(self, model: Cache, draft: Cache) -> None:
        self.model, self.draft = model, draft
        self.capacity, self.nbytes = model.capacity, model.nbytes + draft.nbytes
        self.read = 0
        self.guesses: list[int] = []

    def settle(self, tokens: list[int]) -> None:
        """Keep the rows of guesses that became the text's tokens. The last token's row is always run again."""
        self.read += common_prefix(self.guesses, tokens[self.read : self.read + len(self.guesses)])
        self.read, self.guesses = min(self.read, len(tokens) - 1), []

    def copy_prefix(self, other: Cache, length: int) -> None:
        """Take over the first `length` positions; of the draft's, those that are there."""
        assert isinstance(other, PairedCache)
        self.model.copy_prefix(other.model, length)
        self.read, self.guesses = min(length, other.read), []
        self.draft.copy_prefix(other.draft, self.read)


class PairedRunner:
    """Runs the model; its caches have room for the draft beside them.

    Args:
        model: what computes the logits of the text.
        draft: what guesses; its context may be shorter.
    """

    def __init__(self, model: Runner, draft: Runner) -> None:
        self.model, self.draft = model, draft
        self.name, self.config, self.batch_invariant = model.name, model.config, model.batch_invariant
        self.weight_bytes = model.weight_bytes + draft.weight_bytes

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions, the draft's share included."""
        return self.model.cache_bytes(capacity) + self.draft.cache_bytes(self._draft_capacity(capacity))

    def new_cache(self, capacity: int) -> PairedCache:
        """An empty cache."""
        return PairedCache(self.model.new_cache(capacity), self.draft.new_cache(self._draft_capacity(capacity)))

    def forward(self, chunks: collections.abc.Sequence[ScheduledChunk]) -> Tensor:
        """Run the chunks through the model."""
        return self.model.forward([_of_the_model(chunk) for chunk in chunks])

    def _draft_capacity(self, capacity: int) -> int:
        return min(capacity, self.draft.config.max_position_embeddings)


def _of_the_model(chunk: ScheduledChunk) -> ScheduledChunk:
    assert isinstance(chunk.cache, PairedCache)
    return dataclasses.replace(chunk, cache=chunk.cache.model)
