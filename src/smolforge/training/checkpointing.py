"""Saving and restoring a run: the model directory, the training state in it, and the choice of what stays.

`state_tree` gathers what training will go on changing; the committer copies it to the host, and `writer` fills the
checkpoint's directory from the copy, in a thread of its own where saving is asynchronous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolforge.checkpoint import commit, format
from smolforge.checkpoint.card import card_text
from smolforge.checkpoint.state import load_state, save_state
from smolforge.data import merge_cursors
from smolforge.files import read_json_lines
from smolforge.training import state
from smolforge.training.setup import TrainContext


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: updates made.
        cursor: of the data after the last consumed batch, None at the beginning.
        skip: address ranges of the stream that are left out.
        rollbacks: how often the run has gone back.
    """

    step: int = 0
    cursor: dict[str, Any] | None = None
    skip: list[tuple[int, int]] = field(default_factory=list)
    rollbacks: int = 0


def state_tree(session: TrainContext, position: Position) -> dict[str, Any]:
    """Everything to be saved, not yet copied. Called by all ranks together; rank 0's tree is the whole one."""
    cursors = session.ranks.gather(position.cursor)
    return {
        "weights": session.model.state_dict(),
        "training": {
            "step": position.step,
            "cursor": merge_cursors(cursors),
            "skip": [list(pair) for pair in position.skip],
            "rollbacks": position.rollbacks,
            "optimizer": state.optimizer_tree(session.model, session.optimizer),
            "random": session.ranks.gather(state.random_state(session.plan.device)),
            "scaler": session.scaler.state_dict() if session.scaler else None,
        },
    }


def writer(session: TrainContext, step: int) -> Callable[[Path, Any], None]:
    """What fills the directory of a checkpoint from a copied tree."""

    def fill(directory: Path, tree: Any) -> None:
        rows = list(read_json_lines(session.run.metrics_path))
        card = card_text(session.config, step=step, rows=rows)
        format.write_model(directory, session.config.model, tree["weights"], session.tokenizer, card=card)
        save_state(directory / "training", tree["training"])

    return fill


def restore(session: TrainContext, directory: Path) -> Position:
    """Put a checkpoint's weights, moments and random generators back."""
    device = session.plan.device
    state.assign(session.model, directory)
    tree = load_state(directory / "training")
    session.optimizer.state.clear()
    state.load_optimizer(session.model, session.optimizer, tree["optimizer"])
    randoms = tree["random"]
    state.set_random_state(randoms[session.ranks.rank % len(randoms)], device)
    if session.scaler and tree["scaler"]:
        session.scaler.load_state_dict(tree["scaler"])
    return Position(tree["step"], tree["cursor"], [(a, b) for a, b in tree["skip"]], tree["rollbacks"])


def best_step(session: TrainContext) -> int | None:
    """The step with the best validation among those that still have a checkpoint."""
    present = set(commit.steps(session.run.checkpoints_path))
    scores = {
        row["step"]: row["validation"]["loss"]
        for row in read_json_lines(session.run.metrics_path)
        if "validation" in row and row["step"] in present and row["validation"]["loss"] is not None
    }
    return min(scores, key=lambda step: (scores[step], step)) if scores else None


def prune(session: TrainContext) -> None:
    """Keep what the configuration wants kept."""
    config = session.config.checkpoint
    commit.prune(
        session.run.checkpoints_path,
        keep=config.keep,
        keep_every=config.keep_every,
        best=best_step(session) if config.best else None,
    )
