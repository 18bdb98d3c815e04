"""`smolforge train --dry-run`: every decision of a run, told before its first step; nothing of it is written."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from smolforge.checkpoint import commit
from smolforge.config import RunConfig
from smolforge.devices import choose_device
from smolforge.distributed import DistributedContext
from smolforge.formatting import count, plural
from smolforge.model.summary import summarise
from smolforge.run import Run
from smolforge.training import setup
from smolforge.training.prepare import Prepared, prepare
from smolforge.training.setup import TrainRequest

logger = logging.getLogger(__name__)


def rehearse(request: TrainRequest) -> None:
    """Decide and open all that a run needs but its model, in a temporary directory, and tell it.

    Raises:
        SmolforgeError: what training would raise before its first step.
    """
    device, ranks, run = choose_device(), DistributedContext(), setup.choose_run(request)
    run.check_place()
    newest = None if request.fresh else commit.newest_whole(run.checkpoints_path)
    config = setup.adopt_init(setup.resolve_config(request, run, newest), newest, request)
    with tempfile.TemporaryDirectory(prefix="smolforge-dry-run-") as place:
        scratch = Run(Path(place) / "run")
        scratch.prepare()
        if newest is not None and (index := run.read_index()):
            scratch.write_index(index)
        prepared = prepare(request, scratch, config, newest, ranks, device)
        prepared.corpus.close()
    for reason in prepared.plan.reasons:
        logger.info(reason)
    step = (commit.step_of(newest) or 0) if newest else 0
    if newest is not None:
        setup.announce_changes(run, prepared.config, step)
    _tell(run, prepared.config, prepared, step)


def _tell(run: Run, config: RunConfig, prepared: Prepared, step: int) -> None:
    """What the configuration says of model, optimizer, length, and what is written when."""
    model = summarise(config.model, config.data.sequence_length)
    shape = f"{config.model.num_hidden_layers} layers of width {config.model.hidden_size}"
    logger.info(f"model: {config.model.architecture}, {count(model.parameters)} parameters, {shape}")
    logger.info(f"tokenizer: {prepared.tokenizer.vocab_size:,} tokens")
    decided = {reason.partition(":")[0] for reason in prepared.plan.reasons}  # by the recipe, and told with the reason
    chosen = {
        "optimizer": config.optimizer.name,
        "learning rate": f"{config.optimizer.lr:g} at its peak",
        "schedule": config.schedule.name,
    }
    for name, value in chosen.items():
        if name not in decided:
            logger.info(f"{name}: {value}")
    total, tokens = config.total_steps, config.total_steps * config.tokens_per_step
    logger.info(f"length: {total:,} steps of {config.tokens_per_step:,} tokens, {count(tokens)} tokens in all")
    if prepared.eval_set is not None:
        text = prepared.eval_set
        logger.info(f"validation: {len(text.tokens) - 1:,} tokens of {plural(text.documents, 'held-out document')}")
    state = f"resuming from step {step:,}" if step else "a new run"
    logger.info(f"run: {run.path}, {state}")
    logger.info("dry run: nothing was written")
