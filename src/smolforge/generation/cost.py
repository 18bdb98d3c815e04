"""What a step of a draft model costs, in steps of the model that it drafts for.

Decoding reads every weight once, so the bytes of the weights tell it beforehand. What the processor does besides,
drawing from 49,152 logits above all, they do not tell, so both are timed while they run, and the times win.
"""

from __future__ import annotations

import collections
import statistics

from smolforge.generation.draft import ROW_COST

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
