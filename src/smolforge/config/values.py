"""What all sections share: counts as people write them, and the base class."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

# Counts as people write them: 64k, 1M, 10B (decimal).
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"^\s*(\d+(?:_\d+)*(?:\.\d+)?)\s*([kmbt]?)\s*$", re.IGNORECASE)


def parse_count(value: Any) -> Any:
    """`"64k"` → 64000, or ValueError; other types pass through to pydantic's own check."""
    if not isinstance(value, str):
        return value
    match = _COUNT.match(value)
    if not match:
        raise ValueError(f"{value!r} is not a whole number; write it as 512, 64k, 1M or 10B")
    number = float(match[1].replace("_", "")) * _SUFFIX[match[2].lower()]
    if not number.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


Count = Annotated[int, BeforeValidator(parse_count)]


class Section(BaseModel):
    """A section of the configuration: no unknown keys, no infinities."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True)
