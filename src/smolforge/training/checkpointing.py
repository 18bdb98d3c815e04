"""Checkpoints of a run: the state that training changes, how it is restored, and which checkpoints are kept.

`state_tree` gathers the state; the committer copies it to the host, and `write_checkpoint` writes the checkpoint's
directory from the copy, in a background thread where saving is asynchronous. A checkpoint is a model directory with a
folder `training/`: optimizer moments by parameter name, the data cursor, the random generators of every rank, the
gradient scaler, and the data ranges that are skipped. Of a LoRA run it is the model with the adapter merged, with the
adapter itself in a folder `adapter/`, from which the run continues.

A frame is a model alone, in bf16: four of them keep the beginning of a run for the time-lapse, when all other
checkpoints of it are gone.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smolforge.checkpoint import commit, format, locate
from smolforge.checkpoint.adapter import ADAPTER, write_adapter
from smolforge.checkpoint.background import Committer, snapshot, tree_bytes
from smolforge.checkpoint.card import card_text
from smolforge.checkpoint.parts import Parts, new_staging
from smolforge.checkpoint.state import load_state, save_state, tensors_of
from smolforge.data import merge_cursors
from smolforge.data.loader import merged
from smolforge.data.order import accepted_cursor
from smolforge.distributed import copy_whole, is_sharded
from smolforge.errors import CheckpointError, SmolforgeError
from smolforge.files import read_json_lines
from smolforge.model.lora import adapter_state, merged_state
from smolforge.training.parallel import share_out
from smolforge.training.run_model import check_base, load_adapter, load_weights
from smolforge.training.setup import TrainContext

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: number of updates.
        cursor: of the data after the last batch that was used; None at the beginning.
        skip: ranges of the data stream that are left out, as batch numbers [first, end).
        rollbacks: how often the run has rolled back.
    """

    step: int = 0
    cursor: dict[str, Any] | None = None
    skip: list[tuple[int, int]] = field(default_factory=list)
    rollbacks: int = 0


def left_out(position: Position, asked: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """`Position.skip` with more ranges; asking for the same again changes nothing.

    Args:
        asked: steps [first, end) of a run that leaves nothing out; they count from 1, batches from 0.
    """
    begin, skip = (position.cursor or {"step": 0})["step"], merged(position.skip)
    for first, end in ((a - 1, b - 1) for a, b in asked):
        if any(a <= first and end <= b for a, b in skip):
            continue
        if first < begin:
            known = f"batches {first + 1} to {min(begin, end)} of the stream"
            logger.warning(f"--skip-steps: {known} were trained on before step {position.step + 1}, and stay learned")
        skip += [(max(first, begin), end)] if end > begin else []
    return merged(skip)


def state_tree(context: TrainContext, position: Position) -> dict[str, Any]:
    """Everything to save, not yet copied. Called by all ranks together; rank 0's tree is complete."""
    cursors = context.ranks.all_gather(position.cursor)
    return {
        "weights": _weights(context),
        "training": {
            "step": position.step,
            "cursor": merge_cursors(cursors),
            "skip": [list(pair) for pair in position.skip],
            "rollbacks": position.rollbacks,
            "optimizer": optimizer_state(context.model, context.optimizer),
            "optimizer_name": context.config.optimizer.name,
            **({"base": context.base} if context.config.lora.r else {}),
            "random": context.ranks.all_gather(random_state(context.plan.device)),
            "scaler": context.scaler.state_dict() if context.scaler else None,
            **({"average": context.average.state()} if context.average else {}),
        },
    }


def frame_steps(total: int) -> set[int]:
    """The steps whose models are kept as frames: at 1, 3, 10 and 30% of a run. At its end there is a checkpoint."""
    return {total * percent // 100 for percent in (1, 3, 10, 30)} - {0}


def write_frame(context: TrainContext, step: int, total: int) -> None:
    """Keep the model as a frame where one is due and a rank holds all of it; a failure is told, and the run goes on."""
    if not context.ranks.is_main or context.plan.shards > 1 or step not in frame_steps(total):
        return

    def write(directory: Path) -> None:
        state = _weights(context)
        if context.config.lora.r:
            state = merged_state(context.model, state)
        format.write_model(directory, context.config.model, state, context.tokenizer, dtype=torch.bfloat16)

    try:
        commit.commit(context.run.frames_path, step, write)
    except (OSError, SmolforgeError) as error:
        logger.warning(f"step {step:,} is not kept for the time-lapse: {error}")


def start_save(context: TrainContext, position: Position, committer: Committer) -> Parts | None:
    """Save, in the background where saving is asynchronous. Called by all ranks together.

    Returns:
        This rank's part in the checkpoint of a sharded run; else None.
    """
    tree, ranks, parts = state_tree(context, position), context.ranks, None
    if context.plan.shards > 1:
        with ranks.together():
            staging = new_staging(context.run.checkpoints_path, position.step) if ranks.is_main else None
        parts = Parts(ranks.broadcast(staging), ranks.rank, ranks.world_size)
        tree = share_out(tree, ranks)
    with ranks.together():
        if ranks.is_main:
            write = partial(write_checkpoint, context, parts)
            committer.save(position.step, tree, write, is_copy=parts is not None)
        elif parts:
            weights = {name: tensor for name, tensor in tree["weights"].items() if tensor.device.type != "meta"}
            committer.run(parts.write, weights, tensors_of({"optimizer": tree["training"]["optimizer"]}))
    return parts


def write_checkpoint(context: TrainContext, parts: Parts | None, directory: Path, tree: Any) -> None:
    """Fill a checkpoint's directory from the copied tree, and from `parts` of it that other ranks write."""
    if parts:
        parts.collect(directory)
    part = parts.suffix if parts else ""
    _write_model(context, directory, tree["training"]["step"], tree["weights"], part)
    save_state(directory / "training", tree["training"], part=part)


def keep_average(context: TrainContext, step: int, own: float, averaged: float) -> None:
    """Keep RUN/average, a second checkpoint, exactly while an average has the lowest held-out loss of the run.

    Called on rank 0 while the model holds the average, before the validation of `step` is recorded.

    Args:
        own: held-out loss of the weights themselves at this step.
        averaged: held-out loss of the average.
    """
    rows = read_json_lines(context.run.metrics_path)
    earlier = min((lowest_loss(row) for row in rows if "validation" in row and row["step"] < step), default=math.inf)
    folder = context.run.average_path
    if averaged < min(own, earlier):
        weights = snapshot(_weights(context))
        size = tree_bytes(weights)
        commit.commit(folder, step, lambda path: _write_model(context, path, step, weights), expected_bytes=size)
        commit.prune(folder, keep=1)
    elif own < earlier:
        shutil.rmtree(folder, ignore_errors=True)


def lowest_loss(row: dict[str, Any]) -> float:
    """The held-out loss of a validation's row: that of the weights or of their average, whichever is lower."""
    losses = (row[name]["loss"] for name in ("validation", "average") if name in row)
    return min((loss for loss in losses if loss is not None), default=math.inf)


def _weights(context: TrainContext) -> dict[str, Tensor]:
    """What learns, by name, without copying; beside an adapter the model's own weights never change."""
    return adapter_state(context.model) if context.config.lora.r else context.model.state_dict()


def _write_model(context: TrainContext, directory: Path, step: int, state: dict[str, Tensor], part: str = "") -> None:
    """Write the model with these weights, or with an adapter of these merged and beside it."""
    rows = list(read_json_lines(context.run.metrics_path))
    card = card_text(context.config, step=step, rows=rows)
    config = context.config
    if config.lora.r:
        base = config.init or ""
        place = str(locate.resolve_model(base)) if Path(base).is_dir() else base
        write_adapter(directory / ADAPTER, config.lora, state, place)
        context.tokenizer.save(directory / ADAPTER, max_length=config.model.max_position_embeddings)
        state = merged_state(context.model, state)
    format.write_model(directory, config.model, state, context.tokenizer, card=card, part=part)


def restore(context: TrainContext, directory: Path) -> Position:
    """Load a checkpoint into `context`; its position. CheckpointError where it is damaged or of another model."""
    tree = load_state(directory / "training")
    if context.config.lora.r:
        check_base(context.config, tree.get("base"), context.base)
        load_adapter(context.model, directory / ADAPTER)
    else:
        load_weights(context.model, directory)
    saved, name = tree["optimizer"], context.config.optimizer.name
    wrote = tree.get("optimizer_name") or _writer_of(saved)
    if wrote != name:
        logger.warning(f"optimizer: {name} starts without moments, because this checkpoint has those of {wrote}")
        saved = {}
    load_optimizer_state(context.model, context.optimizer, saved)
    states = tree["random"]
    set_random_state(states[context.ranks.rank % len(states)], context.plan.device)
    if context.scaler and tree["scaler"]:
        context.scaler.load_state_dict(tree["scaler"])
    if context.average:
        context.average.load(tree.get("average"))
    cursor = accepted_cursor(tree["cursor"], context.corpus.index)
    return Position(tree["step"], cursor, [(a, b) for a, b in tree["skip"]], tree["rollbacks"])


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name: names stay valid when groups change, positions would not."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tree: dict[str, Any]) -> None:
    """Replace the optimizer's state by one that `optimizer_state` returned of an equal model."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if tree and set(tree) != set(parameters):
        name = sorted(set(tree) ^ set(parameters))[0]
        raise CheckpointError(f"the optimizer's state does not fit the model at {name}", field="training/")
    optimizer.state.clear()
    for name, state in tree.items():
        optimizer.state[parameters[name]] = {
            key: _moved(value, parameters[name]) if isinstance(value, Tensor) else value for key, value in state.items()
        }


def _moved(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """`value` on the parameter's device, where fused kernels want even step counts; moments in its precision."""
    is_moment = value.dim() and value.shape == parameter.shape and value.is_floating_point()
    if is_moment and is_sharded(parameter):
        moment = torch.zeros_like(parameter)
        copy_whole(moment, value)
        return moment
    return value.to(parameter.device, parameter.dtype if is_moment else value.dtype)


def _writer_of(state: dict[str, Any]) -> str:
    """The optimizer of a state from a checkpoint written before the name was recorded."""
    keys = {key for values in state.values() for key in values}
    return "muon" if "momentum" in keys else "adamw8bit" if "state1" in keys else "adamw"


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 (the global one, which libraries may use)
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def newest_before(context: TrainContext, step: int) -> Path | None:
    """The newest complete checkpoint of fewer than `step` updates, as rank 0 sees it. Called by all ranks together."""
    newest = None
    with context.ranks.together():
        if context.ranks.is_main:
            folder = context.run.checkpoints_path
            earlier = [folder / commit.step_name(found) for found in commit.steps(folder) if found < step]
            newest = next((directory for directory in reversed(earlier) if not commit.verify(directory)), None)
    return context.ranks.broadcast(newest)


def _best_step(context: TrainContext) -> int | None:
    """The step with the lowest validation loss among those that still have a checkpoint."""
    present = set(commit.steps(context.run.checkpoints_path))
    scores = {
        row["step"]: row["validation"]["loss"]
        for row in read_json_lines(context.run.metrics_path)
        if "validation" in row and row["step"] in present and row["validation"]["loss"] is not None
    }
    return min(scores, key=lambda step: (scores[step], step)) if scores else None


def prune_checkpoints(context: TrainContext) -> None:
    """Delete the checkpoints that the configuration does not keep. Only rank 0 does."""
    if not context.ranks.is_main:
        return
    config = context.config.checkpoint
    best = _best_step(context) if config.best else None
    folder = context.run.checkpoints_path
    commit.prune(folder, keep=config.keep, keep_every=config.keep_every, best=best)
    if best is not None:
        commit.point(folder, commit.BEST, commit.step_name(best))
