"""Errors that users read: one message, the field it is about, and what to do.

Every error that a user can cause or meet is a `SmolforgeError`. The command line prints it without a traceback and
exits with its `exit_code`; any other exception is a bug. Codes: 1 a run failed, 2 bad input, 75 the data's source could
not be reached (the run was saved, try again later), 130/143 stopped by a signal after the state was saved.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


class SmolforgeError(Exception):
    """Base of all errors that users read.

    Args:
        message: what happened, in one sentence.
        field: the option, key or file it is about.
        hint: the right value, or what to do next.
    """

    exit_code = 1
    is_reported = False  # by another process of the run

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.field}: {self.message}" if self.field else self.message
        return f"{head}\n  {self.hint}" if self.hint else head


class BadInput(SmolforgeError):
    """An option, a value or a file cannot be used; nothing was changed."""

    exit_code = 2


class ConfigError(BadInput):
    """One or several errors in a configuration, reported together.

    Args:
        problems: the errors, in the order of the configuration.
    """

    def __init__(self, problems: list[BadInput]) -> None:
        super().__init__(f"{len(problems)} errors in the configuration")
        self.problems = problems

    def __str__(self) -> str:
        told = "\n".join(str(problem) for problem in self.problems)
        return told if len(self.problems) == 1 else f"{self.message}:\n{told}"


class DataError(BadInput):
    """A source of text is missing, empty, damaged, or not what its name says."""


class SourceChanged(DataError):
    """A shard is no longer the one that the run's index describes."""


class SourceUnavailable(SmolforgeError):
    """A source could not be reached for `data.patience` seconds; the run was saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: trying again later may help


class CheckpointError(BadInput):
    """A checkpoint or model directory is missing, damaged, or of another architecture."""


class RunLocked(BadInput):
    """Another process is writing this run."""


class RunFailed(SmolforgeError):
    """The run cannot continue (disk full, loss repeatedly not finite)."""


class OtherProcessFailed(RunFailed):
    """Another process of the run failed; its own message says why."""

    is_reported = True


def in_one_line(error: BaseException) -> str:
    """Kind and first line of an error of other code, at most 200 characters of it, for a message of ours."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


class WrongValue(NamedTuple):
    """What pydantic found wrong at one place inside a value."""

    path: tuple[str, ...]  # keys of mappings and positions in lists, from the outside in
    message: str  # to follow the path: `must be a list`
    error: ErrorDetails  # pydantic's own, the first of the place


def wrong_values(errors: Iterable[ErrorDetails], value: Any) -> list[WrongValue]:
    """What pydantic found wrong inside `value`, once for each place, in its order.

    A value of several types has an error for each of them. Where one is about something inside the value, its type was
    meant, and the others say nothing; otherwise what each asks for is told together: `must be a string, or a mapping`.
    """
    places: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for error in errors:
        places.setdefault(_path(error, value), []).append(error)
    around = {path[:length] for path in places for length in range(len(path))}
    return [WrongValue(path, _joined(each), each[0]) for path, each in places.items() if path not in around]


def _path(error: ErrorDetails, value: Any) -> tuple[str, ...]:
    """The keys and positions of `error` inside `value`, without the names of types that pydantic puts between them."""
    path: list[str | int] = []
    for part in error["loc"]:
        is_position = isinstance(part, int) and isinstance(value, (list, tuple)) and part < len(value)
        is_key = isinstance(value, dict) and part in value
        if is_position or is_key:
            value = cast(Any, value)[part]
            path.append(part)
    last = error["loc"][-1:]
    return tuple(map(str, [*path, *last] if error["type"] == "missing" or last == ("[key]",) else path))


def _joined(errors: list[ErrorDetails]) -> str:
    """One message for the errors of one place: what each type asks for, or the first that says more than that."""
    messages = list(dict.fromkeys(_in_yaml_terms(error["msg"]) for error in errors))
    wanted = [message.removeprefix("must be ") for message in messages]
    is_plain = all(message.startswith("must be ") for message in messages)
    return f"must be {', or '.join(wanted)}" if is_plain else messages[0]


# What pydantic says of a type or a length, and what a user of YAML or JSON does.
_TERMS = {
    r"valid dictionary( or (object to extract fields from|instance of \w+))?": "mapping",
    r"valid (list|tuple)": "list",
    r"valid (string|number)": r"\1",
    r"a valid boolean": "true or false",
    r"a valid integer": "a whole number",
    r", unable to (parse|interpret) .*|, got a number with a fractional part|, not \d+$| after validation": "",
    r"^(Input|String|List|Tuple|Dictionary) should": "must",
    r"^Field required": "is required",
    r"^Input tag (.+) found using (.+) does not match any of the expected tags: (.+)": r"\2 must be \3, not \1",
}


def _in_yaml_terms(message: str) -> str:
    """A sentence of pydantic about a wrong value, to follow the value's name: `must be a list`."""
    ours = message.removeprefix("Value error, ")
    if ours == message:
        for theirs, term in _TERMS.items():
            ours = re.sub(theirs, term, ours)
    return ours[:1].lower() + ours[1:]


def first_problem(error: ValidationError) -> BadInput:
    """The first thing that pydantic found wrong with the fields of an object."""
    first = error.errors()[0]
    given = "" if first["type"] in ("value_error", "missing") else f", not {first['input']!r:.100}"
    return BadInput(_in_yaml_terms(first["msg"]) + given, field=str(first["loc"][0]) if first["loc"] else None)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None if none is similar (difflib's ratio of 0.6)."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown(kind: str, word: str, known: Iterable[str], *, field: str | None = None) -> BadInput:
    """The error for a name that is not one of `known`, with the closest valid one."""
    names = sorted(known)
    guess = nearest(word, names)
    hint = f"Did you mean {guess!r}? " if guess else ""
    return BadInput(f"unknown {kind} {word!r}", field=field, hint=f"{hint}Known: {', '.join(names)}.")
