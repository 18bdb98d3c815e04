"""The sections that only tuning has: an adapter, and what is learned from preferences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from smolforge.config.values import Section


def _twice_the_rank(data: dict[str, int]) -> float:
    return 2.0 * data["r"]


class LoraConfig(Section):
    """A low-rank adapter, under peft's names. Only tuning on chat data has one."""

    r: int = Field(default=0, ge=0)
    """Rank of the matrices that learn while the model's own stay as they are; 0 lets every weight learn."""
    lora_alpha: float = Field(default_factory=_twice_the_rank, ge=0)
    """The adapter counts lora_alpha / r times; 2 r unless given."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers it is put beside, such as [q_proj, v_proj]."""


class PreferenceConfig(Section):
    """How a model learns which of two answers is better (`data.format=preferences`)."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid is DPO (arXiv:2305.18290); ipo aims at a fixed margin (arXiv:2310.12036)."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is kept near the one that it starts from."""
