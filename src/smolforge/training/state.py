"""What a checkpoint holds beside the model: all that a run needs to go on exactly.

Optimizer moments under their parameters' names, the cursor of the data, the random generators of every rank, the
gradient scaler, and the ranges of data that are left out. Everything else of a run is derived from its files.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from smolforge.checkpoint import format, weights
from smolforge.errors import CheckpointError
from smolforge.model.architecture import CausalLM


def optimizer_tree(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's moments by parameter name. Names survive a reordering, positions would not."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tree: dict[str, Any]) -> None:
    """Put moments back.

    Raises:
        CheckpointError: the moments are not those of this model.
    """
    parameters = dict(model.named_parameters())
    if tree and set(tree) != set(parameters):
        strange = sorted(set(tree) ^ set(parameters))[0]
        raise CheckpointError(f"the optimizer's state does not fit the model at {strange}", field="training/")
    for name, state in tree.items():
        parameter = parameters[name]
        moved = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise CheckpointError(f"{key} of {name} has shape {tuple(value.shape)}", field="training/")
            # The fused kernels want their step counts where the parameters are.
            moved[key] = value.to(parameter.device) if isinstance(value, torch.Tensor) else value
        optimizer.state[parameter] = moved


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 (the global one, which libraries may use)
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put every random generator of this process back where it was."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def assign(model: CausalLM, directory: Path) -> None:
    """Copy the weights of a model directory into `model`, in the precision that `model` has.

    Raises:
        CheckpointError: they are missing, damaged, or of another shape.
    """
    found = format.check_weights(model.config, weights.read_weights(directory), str(directory))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
