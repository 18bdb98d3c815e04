"""How help and usage errors look: wide, with the examples kept as they were written."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from smolforge.errors import nearest


class Parser(argparse.ArgumentParser):
    """argparse with exact option names, examples kept as written, and a guess for a mistyped word."""

    def __init__(self, **settings: object) -> None:
        settings.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, the message, and where to read on."""
        options = [name for action in self._actions for name in action.option_strings]
        choices = [str(c) for a in self._actions if isinstance(a, argparse._SubParsersAction) for c in a.choices]
        guess = None
        if message.startswith("unrecognized arguments:"):
            word = message.split(":", 1)[1].split()[0]
            guess = nearest(word.split("=")[0], options) if word.startswith("-") else None
        elif "invalid choice:" in message:
            guess = nearest(message.split("'")[1], choices)
        hint = f"Did you mean {guess}? " if guess else ""
        print(f"error: {message}\n  {hint}`{self.prog} --help` shows what there is.", file=sys.stderr)
        sys.exit(2)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse, but words that nobody knows are reported by the verb they were given to."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            verbs = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
            verb = verbs[0].choices.get(found.verb) if verbs and found.verb else None
            (verb or self).error(f"unrecognized arguments: {' '.join(rest)}")
        return found


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)
