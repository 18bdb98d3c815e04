"""Guessing the next tokens from the text itself, so that one step of the model may write several.

Prompt lookup (Saxena 2023): where the last few tokens occurred before, what followed them is proposed. The model
reads the guesses beside the last token in one step, and each is compared with what the sampler draws in its
place. A draw is a pure function of logits and position (`sampler.py`), so the text is the same, token for token,
with guesses or without: not only in distribution, as where drafts are accepted by chance.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smolforge.generation.draft_model import DraftModel
    from smolforge.generation.sequence import ScheduledChunk, Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must agree; a longer agreement is asked first
MOST = 8  # guesses in one step
ROW_COST = 0.25  # of one more row, in steps of one row (benchmarks/generation: 0.12 in fp32 to 0.35 in int4)
MEMORY = 0.15  # weight of the newest guess in the running rate
RECOVERY = 0.004  # by which the rate rises in a step without guesses, so that they are tried again


class Rate:
    """Running share of guesses that were right.

    Attributes:
        value: in [0, 1].
    """

    def __init__(self, value: float = 0.6) -> None:
        self.value = value

    def learn(self, proposed: int, right: int) -> None:
        """Of so many guesses the first `right` were drawn."""
        for _ in range(right):
            self.value += MEMORY * (1 - self.value)
        if right < proposed:
            self.value -= MEMORY * self.value

    def rest(self) -> None:
        """A step went by without guesses, because the rate is too low."""
        self.value = min(1.0, self.value + RECOVERY)


class NgramDraft:
    """Drafts for one continuation.

    Args:
        tokens: of the continuation, prompt included; the list that grows while it is written.

    Attributes:
        rate: running share of guesses that were right.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._followers: dict[tuple[int, ...], int] = {}  # tokens in a row: where their follower stands, the last time
        self._indexed = 0
        self.rate = Rate()

    def propose(self, running: int, room: int) -> list[int]:
        """Guesses for the tokens to come, at most `room`, as many as are worth their rows; often none.

        Args:
            running: continuations that share the step, this one included. The more there are, the more of a step
                an unneeded row takes.
        """
        self._index()
        count = min(worthwhile(self.rate.value, running), room)
        if count <= 0:
            self.rate.rest()
            return []
        for size in range(LONGEST, SHORTEST - 1, -1):
            at = self._followers.get(tuple(self._tokens[-size:]))
            if at is not None:
                period = len(self._tokens) - at  # what repeats, repeats on past its end
                return [self._tokens[at + i % period] for i in range(count)]
        return []

    def _index(self) -> None:
        for at in range(max(self._indexed, SHORTEST), len(self._tokens)):
            for size in range(SHORTEST, min(LONGEST, at) + 1):
                self._followers[tuple(self._tokens[at - size : at])] = at
        self._indexed = len(self._tokens)


def worthwhile(rate: float, running: int) -> int:
    """How many guesses pay: the k-th is right with probability rate^k and costs one row of the step."""
    share = row_share(running)
    if rate <= share:
        return 0
    return MOST if rate >= 1 else min(MOST, int(math.log(share) / math.log(rate)))


def row_share(running: int) -> float:
    """What one more row costs, in units of a token's own cost in a step of so many continuations."""
    return running * ROW_COST / (1 + (running - 1) * ROW_COST)


def speed(rate: float, count: int, share: float) -> float:
    """Tokens for the cost of one without guesses: 1 with none, where each of `count` guesses costs `share` of it."""
    return sum(rate**i for i in range(count + 1)) / (1 + count * share)


def fastest(rate: float, share: float) -> int:
    """The number of guesses, 0 to MOST, with the greatest `speed`; the fewest of equals."""
    return max(range(MOST + 1), key=lambda count: speed(rate, count, share))


WINDOW = 31  # times of each; their median, since a step that another program interrupted is no cost
ENOUGH = 8  # times of each before they are believed
FORGET = 256  # steps without drafts after which their times are forgotten: a bad moment must not count for ever


class Cost:
    """A ratio of two times.

    Args:
        bytes_ratio: of the draft's weights to the model's.
    """

    def __init__(self, bytes_ratio: float) -> None:
        self.bytes_ratio = bytes_ratio
        self._draft: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._model: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._undrafted = 0

    @property
    def value(self) -> float:
        """Seconds of a one-row step of the draft over those of the model."""
        if min(len(self._draft), len(self._model)) < ENOUGH:
            return self.bytes_ratio
        return statistics.median(self._draft) / statistics.median(self._model)

    def draft_took(self, rows: int, seconds: float) -> None:
        """A step of the draft over so many rows, its draws included."""
        self._draft.append(_one_row(rows, seconds))
        self._undrafted = 0

    def model_took(self, rows: int, seconds: float) -> None:
        """A step of the model over so many rows, its draws included and its draft's time not."""
        self._model.append(_one_row(rows, seconds))
        self._undrafted += 1
        if self._undrafted > FORGET:
            self._draft.clear()


def _one_row(rows: int, seconds: float) -> float:
    return seconds / (1 + (rows - 1) * ROW_COST)


class Speculation:
    """Guesses for what runs.

    Args:
        draft: the draft model, where there is one.
    """

    def __init__(self, draft: DraftModel | None = None) -> None:
        self.draft = draft
        self._learning: dict[Sequence, list[Rate]] = {}  # of the step that runs: whose guesses each sequence has

    def begin(self, sequence: Sequence) -> None:
        """Guess for a new sequence from now on."""
        sequence.lookup = NgramDraft(sequence.tokens)
        if self.draft is not None:
            sequence.draft_rate = Rate(self.draft.rate.value)

    def extend(
        self, work: Iterable[tuple[Sequence, ScheduledChunk]], running: int
    ) -> list[tuple[Sequence, ScheduledChunk]]:
        """The chunks of a step with guesses behind them, where they pay.

        Args:
            running: sequences that share the step.

        Raises:
            RunFailed: the draft model's logits are not numbers.
        """
        self._learning = {}
        found: dict[Sequence, list[int]] = {}
        asked: list[tuple[Sequence, int]] = []
        for sequence, _ in work:
            # The first token is not guessed for: the last row of the prompt brings it.
            ready, room = sequence.pending == 1 and sequence.written > 0, sequence.limit - len(sequence.tokens) - 1
            if sequence.lookup is not None and ready and room > 0:
                found[sequence] = sequence.lookup.propose(running, room)
            count = self._ask(sequence, running, room if ready else room - 1, len(found.get(sequence, ())))
            if count:
                asked.append((sequence, count if ready else 0))
        drafted = self.draft.propose(asked) if self.draft is not None and asked else {}
        return [(sequence, self._guess(sequence, chunk, found, drafted)) for sequence, chunk in work]

    def learn(self, sequence: Sequence, proposed: int, right: int) -> None:
        """Of so many guesses of the last `extend` the first `right` were drawn."""
        for rate in self._learning[sequence]:
            rate.learn(proposed, right)

    def took(self, work: list[tuple[Sequence, ScheduledChunk]], seconds: float) -> None:
        """The step over these chunks took so long, drawing included and drafting not."""
        if self.draft is not None and all(len(chunk.tokens) == 1 + chunk.guessed for _, chunk in work):
            self.draft.cost.model_took(sum(len(chunk.tokens) for _, chunk in work), seconds)

    def _ask(self, sequence: Sequence, running: int, room: int, looked_up: int) -> int:
        """How many guesses the draft model is asked for, the lookup having found so many; 0 where it stays silent."""
        draft, rate = self.draft, sequence.draft_rate
        if draft is None or rate is None:
            return 0
        room = min(room, draft.room(sequence))
        if room <= 0:
            return 0
        count = min(draft.worthwhile(rate.value, running), room)
        if not count:
            if draft.share(running) < 1:  # above, no rate is high enough
                rate.rest()
            return 0
        # What was looked up costs no step of the draft, and a draft that is mostly right may still be the faster:
        # so each is taken by the tokens that its own record promises for its price.
        if looked_up and sequence.lookup is not None:
            free = speed(sequence.lookup.rate.value, looked_up, row_share(running))
            if free >= speed(rate.value, count, draft.share(running)):
                return 0
        return count

    def _guess(
        self,
        sequence: Sequence,
        chunk: ScheduledChunk,
        found: dict[Sequence, list[int]],
        drafted: dict[Sequence, list[int]],
    ) -> ScheduledChunk:
        if self.draft is not None and sequence.draft_rate is not None and drafted.get(sequence):
            self._learning[sequence] = [sequence.draft_rate, self.draft.rate]
            return chunk.guess(drafted[sequence])
        if sequence.lookup is not None and found.get(sequence):
            self._learning[sequence] = [sequence.lookup.rate]
            return chunk.guess(found[sequence])
        return chunk
