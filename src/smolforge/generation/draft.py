"""Guessing the next tokens from the text itself, so that one step of the model may write several.

Prompt lookup (Saxena 2023): where the last few tokens occurred before, what followed them is proposed. The model
reads the guesses beside the last token in one step, and each is compared with what the sampler draws in its
place. A draw is a pure function of logits and position (`sampler.py`), so the text is the same, token for token,
with guesses or without: not only in distribution, as where drafts are accepted by chance.
"""

from __future__ import annotations

import math

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


class Lookup:
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
