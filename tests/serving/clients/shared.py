"""What the scripts of this folder share: a server's address and model from the command line, and what they ask for."""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import BaseModel, Field

URL, MODEL = sys.argv[1:3]
KEY = "none"
QUESTION = "Tell me about an animal of the forest."


class Animal(BaseModel):
    """An animal, of a bounded length, since a tiny model writes strings without end."""

    kind: Literal["fox", "bear", "owl"]
    legs: int = Field(ge=0, le=99)
    tame: bool
