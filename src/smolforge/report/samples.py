"""The samples: how each fixed prompt was continued as the model learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from smolforge.report.formatting import clean, whole

MAX_PROMPTS = 8
MAX_CARDS = 5
"""Continuations shown of one prompt."""
_BUDGET = 400_000
"""Bytes that all samples together may take on the page."""


@dataclass(frozen=True)
class Card:
    """One continuation."""

    step: str
    text: str
    reason: str


@dataclass(frozen=True)
class Story:
    """One prompt and its continuations, the oldest first."""

    prompt: str
    cards: list[Card]
    hidden: int
    """Continuations left out between the shown ones."""


def stories(samples: Sequence[dict[str, Any]]) -> list[Story]:
    """The prompts in the order they first came, each with at most `MAX_CARDS` steps: first, last, some between."""
    by_prompt: dict[str, dict[float, dict[str, Any]]] = {}
    for row in samples:
        prompt = str(row.get("prompt") or "")
        if prompt in by_prompt or len(by_prompt) < MAX_PROMPTS:
            by_prompt.setdefault(prompt, {})[row["step"]] = row  # a step that was repeated counts once
    limit = 2000
    while limit > 50:
        told = [_story(prompt, rows, limit) for prompt, rows in by_prompt.items()]
        if sum(len(escape(card.text).encode()) for story in told for card in story.cards) <= _BUDGET:
            return told
        limit //= 2
    return [_story(prompt, rows, limit) for prompt, rows in by_prompt.items()]


def _story(prompt: str, rows: dict[float, dict[str, Any]], limit: int) -> Story:
    steps = sorted(rows)
    chosen = _telling(steps)
    return Story(clean(prompt, 300), [_card(prompt, rows[step], limit) for step in chosen], len(steps) - len(chosen))


def _telling(steps: list[float]) -> list[float]:
    """First and last, and between them steps that lie evenly on a logarithmic scale: early steps change the most."""
    if len(steps) <= MAX_CARDS:
        return steps
    places = np.unique(np.geomspace(1, len(steps), MAX_CARDS).round().astype(int)) - 1
    rest = [index for index in np.linspace(0, len(steps) - 1, 4 * MAX_CARDS).round().astype(int) if index not in places]
    while len(places) < MAX_CARDS and rest:
        places = np.sort(np.append(places, rest.pop(len(rest) // 2)))
    return [steps[index] for index in places]


def _card(prompt: str, row: dict[str, Any], limit: int) -> Card:
    text = str(row.get("text") or "").removeprefix(prompt)
    ended = str(row.get("finish_reason") or "length")
    reason = {"stop": "ended by itself", "length": ""}.get(ended, ended)
    return Card(whole(float(row["step"])), clean(text, limit), clean(reason, 40))
