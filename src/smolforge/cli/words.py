"""The words of a command line in any order: `generate RUN --seed 7 "Once"`, `eval --data a b MODEL`.

argparse wants the words that belong to no option together, and gives an option that takes several words all that
follow. So the words are sorted before it reads them. `--model` and `--prompt` are other names for the places of MODEL
(of `train` the preset) and PROMPT.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

MODEL_PLACES, PROMPT_PLACES = ("model", "base", "preset"), ("prompts", "question")


def arrange(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The same words, options first and then, behind `--`, those that belong to none."""
    places = [action for action in parser._actions if not action.option_strings]
    if not places or any(isinstance(place, argparse._SubParsersAction) for place in places):
        return list(words)
    sorter = _Sorter(parser, places, list(words))
    while sorter.words:
        sorter.next()
    own = sorter.placed()
    return [*sorter.options, "--", *own] if own else sorter.options


class _Sorter:
    def __init__(self, parser: argparse.ArgumentParser, places: list[argparse.Action], words: list[str]) -> None:
        self.parser, self.places, self.words = parser, places, words
        self.options: list[str] = []
        self.own: list[str] = []
        self.model: list[str] = []
        self.prompts: list[str] = []
        self.several = range(0)  # places in `options` of the words that an option of several took last

    def next(self) -> None:
        """Sort the next word, with the values where it is an option."""
        word = self.words.pop(0)
        name, equals, value = word.partition("=")
        action = self.parser._option_string_actions.get(name)
        named = self._named(name) if action is None else None
        if word == "--":
            self.own += self.words
            self.words.clear()
        elif named is not None:
            if not equals and not self.words:
                self.parser.error(f"argument {name}: expected one argument")
            named.append(value if equals else self.words.pop(0))
        elif action is None and not (word.startswith("-") and len(word) > 1):
            self.own.append(word)
        else:
            self.options.append(word)
            if action is not None and not equals:
                self._take(action)

    def _named(self, name: str) -> list[str] | None:
        """Where the value of `--model` or `--prompt` goes, in verbs that have its place."""
        if name == "--model" and self.places[0].dest in MODEL_PLACES:
            return self.model
        return self.prompts if name == "--prompt" and self.places[-1].dest in PROMPT_PLACES else None

    def _take(self, action: argparse.Action) -> None:
        """Take the values of an option."""
        if action.nargs in (None, 1):
            self.options += self.words[:1]
            del self.words[:1]
            return
        if action.nargs not in ("?", "+", "*"):
            return
        start = len(self.options)
        while self.words and _fits(action, self.words[0]) and (action.nargs != "?" or len(self.options) == start):
            self.options.append(self.words.pop(0))
        if action.nargs != "?":
            self.several = range(start, len(self.options))

    def placed(self) -> list[str]:
        """The words that belong to no option; a missing one is the last that an option of several took."""
        own = [*self.model, *self.own]
        if self.prompts and len(self.places) > 1 and not own:
            self.parser.error(f"--prompt needs {self.places[0].metavar} too")
        needed = sum(place.nargs in (None, "+") for place in self.places)
        is_name = getattr(self.places[0], "is_name", None)
        if len(self.several) > 1 and (
            len(own) < needed or (not own and is_name and is_name(self.options[self.several[-1]]))
        ):
            own.append(self.options.pop(self.several[-1]))
        return [*own, *self.prompts]


def _fits(action: argparse.Action, word: str) -> bool:
    """Whether a word can be a value of an option that takes several or none."""
    if word.startswith("-") and len(word) > 1:
        return False
    if action.choices is not None:
        return word in action.choices
    try:
        return not callable(action.type) or action.type(word) is not None
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
