"""Apply the plan to the optimizer; the model has its choices from its constructor."""

from __future__ import annotations

import torch

from smolforge.training import compiling
from smolforge.training.optim import stochastic_adamw
from smolforge.training.optim.stochastic_adamw import StochasticAdamW
from smolforge.training.plan import Plan


def apply_plan(optimizer: torch.optim.Optimizer, chosen: Plan) -> None:
    """Use the planned update, compiled or not."""
    if isinstance(optimizer, StochasticAdamW) and chosen.update == "native":
        optimizer.update = stochastic_adamw.native_update
    if chosen.compile:
        compiling.compile_update(optimizer)
