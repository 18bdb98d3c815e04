"""A small model that guesses what a large one will write (Leviathan et al. 2022; Chen et al. 2023).

It draws from its own logits with the sampler's own arithmetic and the uniform number of the very position, so the
two models meet the same chance: where they believe the same, they draw the same token, at any temperature. The text
stays that of the large model, token for token. The price: where beliefs are flat, a small difference moves the draw to
a neighbour, so fewer guesses are right than the papers' acceptance by chance allows, which would change the text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from smolforge.errors import RunFailed
from smolforge.generation.cost import Cost
from smolforge.generation.draft import Rate, fastest, row_share
from smolforge.generation.paired import PairedCache
from smolforge.generation.request import Choice
from smolforge.generation.runner import Runner
from smolforge.generation.scheduler import CHUNK, ROWS, Piece

FEW_TOKENS = 2  # pieces of a step that is timed: the last token, and the guess before it that was never run


class DraftModel:
    """Guesses for all choices of a step together. The choices' caches are `PairedCache`s.

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
        """How many guesses pay for texts of such a rate, in a step of so many choices; 0 where none does."""
        return fastest(rate, self.share(running))

    def share(self, running: int) -> float:
        """What a guess costs, in units of a token's own cost: a row of the model's step and a step of the draft."""
        return row_share(running) + self.cost.value

    def room(self, choice: Choice) -> int:
        """Most guesses that fit the draft's context; below 0 where even the text does not."""
        return self.context - len(choice.tokens) + 1 if len(choice.tokens) <= self.context else -1

    def propose(self, asked: Sequence[tuple[Choice, int]]) -> dict[Choice, list[int]]:
        """Read on in each text, and guess its next tokens where it has been read to its end.

        Args:
            asked: choices with the most guesses of each; 0 only reads.

        Raises:
            RunFailed: the logits are not numbers.
        """
        pieces, drawing = self._read(asked)
        guesses: dict[Choice, list[int]] = {choice: [] for choice, _ in drawing}
        samplers = {choice: choice.sampler.ahead() for choice, _ in drawing}
        while pieces:
            began, rows = time.perf_counter(), sum(len(piece.tokens) for piece in pieces)
            timed = bool(drawing) and all(len(piece.tokens) <= FEW_TOKENS for piece in pieces)
            logits = self.runner.forward(pieces)
            if len(logits) and torch.isnan(logits.max()):
                raise RunFailed("the draft model's logits are not numbers", hint="Go on without --draft.")
            pieces, drawn, drawing = [], drawing, []
            for row, (choice, count) in enumerate(drawn):
                found, sampler, cache = guesses[choice], samplers[choice], _paired(choice)
                token_id = sampler.choose(logits[row], choice.written + len(found))
                found.append(token_id)
                if len(found) < count and token_id not in choice.ends:
                    sampler.observe(token_id)
                    pieces.append(Piece(cache.draft, [token_id], len(choice.tokens) + len(found) - 1, 1))
                    drawing.append((choice, count))
                    cache.guesses.append(token_id)
            if timed:
                self.cost.draft_took(rows, time.perf_counter() - began)
        return guesses

    def _read(self, asked: Sequence[tuple[Choice, int]]) -> tuple[list[Piece], list[tuple[Choice, int]]]:
        """The pieces that bring the draft's caches up to date, as many rows as a step has; who draws from them."""
        pieces, drawing, rows = [], [], 0
        for choice, count in asked:
            cache = _paired(choice)
            cache.settle(choice.tokens)
            tokens = choice.tokens[cache.read : cache.read + CHUNK]
            if rows and rows + len(tokens) > ROWS:
                break
            draws = count > 0 and cache.read + len(tokens) == len(choice.tokens)
            pieces.append(Piece(cache.draft, tokens, cache.read, int(draws)))
            if draws:
                drawing.append((choice, count))
            cache.read += len(tokens)
            rows += len(tokens)
        return pieces, drawing


def _paired(choice: Choice) -> PairedCache:
    assert isinstance(choice.cache, PairedCache)
    return choice.cache
