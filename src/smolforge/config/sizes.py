"""Counts and amounts of memory as people write them: `64k`, `1M`, `10B` (decimal), `6GB` (2**30 bytes each)."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"^\s*(\d+(?:_\d+)*(?:\.\d+)?)\s*([kmbt]?)\s*$", re.IGNORECASE)
_MEMORY = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(kb|mb|gb|tb|b)?\s*$", re.IGNORECASE)


def parse_count(value: Any) -> Any:
    """`"64k"` → 64000; other types pass through to pydantic's own check.

    Raises:
        ValueError: not a count.
    """
    if not isinstance(value, str):
        return value
    match = _COUNT.match(value)
    if not match:
        raise ValueError(f"{value!r} is not a whole number; write it as 512, 64k, 1M or 10B")
    number = float(match[1].replace("_", "")) * _SUFFIX[match[2].lower()]
    if not number.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def parse_memory(value: Any) -> Any:
    """`"6GB"` → bytes, with 2**30 bytes to a GB.

    Raises:
        ValueError: not an amount of memory.
    """
    if not isinstance(value, str):
        return value
    match = _MEMORY.match(value)
    if not match:
        raise ValueError(f"{value!r} is not an amount of memory; write it as 6GB or 512MB")
    power = ("b", "kb", "mb", "gb", "tb").index((match[2] or "b").lower())
    return int(float(match[1]) * 1024**power)


Count = Annotated[int, BeforeValidator(parse_count)]
Memory = Annotated[int, BeforeValidator(parse_memory)]
