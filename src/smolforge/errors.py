"""What can go wrong, said once and clearly.

Every error a user can cause or meet is a `SmolforgeError`: one message, the field it is about, and what would
be right. The command line prints it without a traceback and exits with `exit_code`; anything else that escapes
is a bug of ours. Codes: 1 a run failed, 2 bad input, 75 the data's source stayed away (the run was saved, try
again later), 130/143 stopped by a signal after the state was saved.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SmolforgeError(Exception):
    """Base of all errors that are meant to be read by a person.

    Args:
        message: what happened, one sentence.
        field: the option, key or file it is about, where there is one.
        hint: what would be right, or what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.field}: {self.message}" if self.field else self.message
        return f"{head}\n  {self.hint}" if self.hint else head


class BadInput(SmolforgeError):
    """The user's words or files cannot be used as they are; nothing was changed."""

    exit_code = 2


class ConfigError(BadInput):
    """One or several things wrong with a configuration, told together.

    Args:
        problems: the single errors, in the order of the configuration.
    """

    def __init__(self, problems: list[BadInput]) -> None:
        self.problems = problems
        head = "" if len(problems) == 1 else f"{len(problems)} problems in the configuration:\n"
        super().__init__(head + "\n".join(str(problem) for problem in problems))


class DataError(BadInput):
    """A source of text is missing, empty, damaged, or not what its name says."""


class SourceChanged(DataError):
    """A shard is no longer the one that the run's index describes."""


class SourceUnavailable(SmolforgeError):
    """The network stayed away for longer than the patience allowed; the run was saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: trying again later may help


class CheckpointError(BadInput):
    """A checkpoint or model directory is missing, damaged, or of another architecture."""


class RunLocked(BadInput):
    """Another process is writing this run."""


class RunFailed(SmolforgeError):
    """The run itself could not go on (disk full, loss not finite again and again)."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to `word`, or None where nothing is near (difflib's ratio of 0.6)."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown(kind: str, word: str, known: Iterable[str], *, field: str | None = None) -> BadInput:
    """The error for a name that is not one of `known`, with the nearest right one."""
    names = sorted(known)
    guess = nearest(word, names)
    hint = f"Did you mean {guess!r}? " if guess else ""
    return BadInput(f"unknown {kind} {word!r}", field=field, hint=f"{hint}Known: {', '.join(names)}.")
