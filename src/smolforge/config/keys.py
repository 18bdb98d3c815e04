"""What keys there are: named where one is wrong, and listed for docs/configuration.md."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel

from smolforge.config.sections import RunConfig
from smolforge.errors import BadInput, nearest


def explain(error: Any) -> BadInput:
    """What pydantic says of one wrong key or value, in our words, with the nearest right key."""
    path = [str(part) for part in error["loc"] if part not in _BRANCHES]
    field = ".".join(path) or None
    kind, message = error["type"], error["msg"]
    if kind == "extra_forbidden":
        known = _keys_at(path[:-1])
        guess = nearest(path[-1], known) or _elsewhere(path[-1])
        hint = f"Did you mean {guess!r}? " if guess else ""
        return BadInput("unknown key", field=field, hint=f"{hint}Known here: {', '.join(known)}.")
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        inner, colon, rest = text.partition(": ")
        if colon and re.fullmatch(r"[\w.]+", inner):
            return BadInput(rest, field=f"{field}.{inner}" if field else inner)
        return BadInput(text, field=field)
    given = "" if isinstance(error.get("input"), dict) else f", not {error.get('input')!r}"
    return BadInput(f"{message[0].lower()}{message[1:]}{given}", field=field)


# Tags that pydantic adds to a location for the members of a union; they are not keys.
_BRANCHES = {"TokenizerConfig", "str", "int", "bool"}


def _keys_at(path: list[str]) -> list[str]:
    section: Any = RunConfig
    for key in path:
        field = section.model_fields.get(key) if _is_section(section) else None
        options = [field.annotation, *get_args(field.annotation)] if field else []
        section = next((option for option in options if _is_section(option)), None)
    return sorted(section.model_fields) if _is_section(section) else []


def _elsewhere(key: str) -> str | None:
    places = [
        f"{name}.{inner}"
        for name, field in RunConfig.model_fields.items()
        if _is_section(field.annotation)
        for inner in field.annotation.model_fields  # type: ignore[union-attr]
    ]
    exact = [place for place in places if place.split(".")[1] == key]
    return exact[0] if exact else nearest(key, places)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def key_table() -> str:
    """All keys with their defaults and meanings, as the Markdown tables of docs/configuration.md."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in RunConfig.model_fields.items():
        if _is_section(field.annotation):
            for inner, leaf in field.annotation.model_fields.items():  # type: ignore[union-attr]
                lines.append(_row(f"{name}.{inner}", leaf))
        else:
            lines.append(_row(name, field))
    return "\n".join(lines)


def _row(key: str, field: Any) -> str:
    derived = field.default_factory_takes_validated_data  # from other keys: its meaning says how
    default = None if derived else field.get_default(call_default_factory=True)
    shown = default.model_dump() if isinstance(default, BaseModel) else default
    meaning = " ".join((field.description or "").split())
    return f"| `{key}` | `{'' if shown is None else shown}` | {meaning} |".replace("``", "")
