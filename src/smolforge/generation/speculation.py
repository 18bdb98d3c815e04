"""Which guesses run along in a step: from the text itself, or from a draft model, or none where none pays."""

from __future__ import annotations

from collections.abc import Sequence

from smolforge.generation.draft import Lookup, Rate, row_share, speed
from smolforge.generation.draft_model import DraftModel
from smolforge.generation.request import Choice
from smolforge.generation.scheduler import Piece

Work = list[tuple[Choice, Piece]]


class Speculation:
    """Guesses for what runs.

    Args:
        draft: the draft model, where there is one.
    """

    def __init__(self, draft: DraftModel | None = None) -> None:
        self.draft = draft
        self._learning: dict[Choice, list[Rate]] = {}  # of the step that runs: whose guesses each choice has

    def begin(self, choice: Choice) -> None:
        """Guess for a new choice from now on."""
        choice.lookup = Lookup(choice.tokens)
        if self.draft is not None:
            choice.draft_rate = Rate(self.draft.rate.value)

    def extend(self, work: Work, running: int) -> Work:
        """The pieces of a step with guesses behind them, where they pay.

        Args:
            running: choices that share the step.

        Raises:
            RunFailed: the draft model's logits are not numbers.
        """
        self._learning = {}
        found: dict[Choice, list[int]] = {}
        asked: list[tuple[Choice, int]] = []
        for choice, _ in work:
            # The first token is not guessed for: the last row of the prompt brings it.
            ready, room = choice.pending == 1 and choice.written > 0, choice.limit - len(choice.tokens) - 1
            if choice.lookup is not None and ready and room > 0:
                found[choice] = choice.lookup.propose(running, room)
            count = self._ask(choice, running, room if ready else room - 1, len(found.get(choice, ())))
            if count:
                asked.append((choice, count if ready else 0))
        drafted = self.draft.propose(asked) if self.draft is not None and asked else {}
        return [(choice, self._guess(choice, piece, found, drafted)) for choice, piece in work]

    def learn(self, choice: Choice, proposed: int, right: int) -> None:
        """Of so many guesses of the last `extend` the first `right` were drawn."""
        for rate in self._learning[choice]:
            rate.learn(proposed, right)

    def took(self, work: Sequence[tuple[Choice, Piece]], seconds: float) -> None:
        """The step over these pieces took so long, drawing included and drafting not."""
        if self.draft is not None and all(len(piece.tokens) == 1 + piece.guessed for _, piece in work):
            self.draft.cost.model_took(sum(len(piece.tokens) for _, piece in work), seconds)

    def _ask(self, choice: Choice, running: int, room: int, looked_up: int) -> int:
        """How many guesses the draft model is asked for, the lookup having found so many; 0 where it stays silent."""
        draft, rate = self.draft, choice.draft_rate
        if draft is None or rate is None:
            return 0
        room = min(room, draft.room(choice))
        if room <= 0:
            return 0
        count = min(draft.worthwhile(rate.value, running), room)
        if not count:
            if draft.share(running) < 1:  # above, no rate is high enough
                rate.rest()
            return 0
        # What was looked up costs no step of the draft, and a draft that is mostly right may still be the faster:
        # so each is taken by the tokens that its own record promises for its price.
        if looked_up and choice.lookup is not None:
            free = speed(choice.lookup.rate.value, looked_up, row_share(running))
            if free >= speed(rate.value, count, draft.share(running)):
                return 0
        return count

    def _guess(
        self, choice: Choice, piece: Piece, found: dict[Choice, list[int]], drafted: dict[Choice, list[int]]
    ) -> Piece:
        if self.draft is not None and choice.draft_rate is not None and drafted.get(choice):
            self._learning[choice] = [choice.draft_rate, self.draft.rate]
            return piece.guess(drafted[choice])
        if choice.lookup is not None and found.get(choice):
            self._learning[choice] = [choice.lookup.rate]
            return piece.guess(found[choice])
        return piece
