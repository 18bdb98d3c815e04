"""Size and length of a run that names no preset: from the amount of text and the minutes that are given.

Training is measured on this machine for a second, with the smallest preset; the speed of a larger one follows from its
floating point operations. A model is given ten tokens for each parameter at least, and no text more than ten times.
What was chosen is kept in the run's configuration, so a resumed run measures nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from smolforge.config import RunConfig, build_config
from smolforge.data import Corpus
from smolforge.data.sources import local
from smolforge.devices import choose_device
from smolforge.errors import BadInput
from smolforge.formatting import count, plural, size
from smolforge.logging import quiet
from smolforge.model.summary import flops_per_token, summarise
from smolforge.run import Run
from smolforge.training.bench import measure as measure_speed
from smolforge.training.data_size import measure
from smolforge.training.recipe import resolve_batch
from smolforge.training.run_data import keep_places
from smolforge.training.setup import TrainRequest

logger = logging.getLogger(__name__)

LADDER = ("pocket", "llama-5m", "llama-13m", "llama-36m", "llama-83m")  # by size
LENGTHS = ("steps", "tokens", "epochs")
MINUTES = 5.0  # unless given
TOKENS_PER_PARAMETER = 10
MOST_EPOCHS = 10
FEWEST_STEPS = 300  # of a small text, which is read more often then
SHARE_OF_STEPS = 0.8  # of the time; the rest goes into the tokenizer, validations and checkpoints
SMALL_TEXT = 1 << 20  # bytes; continuing a pretrained model learns more from so little


def choose(request: TrainRequest, minutes: float | None) -> TrainRequest:
    """The request with a preset and a length, where it names neither and the run is new; else as it is.

    A model that is trained on (`init`) gets the preset `continue`.

    Args:
        minutes: the time to train for; `MINUTES` where None.

    Raises:
        BadInput: `minutes` is not above 0, or was given for a run that several processes share.
    """
    if minutes is not None and not minutes > 0:
        raise BadInput(f"{minutes} must be above 0", field="--minutes")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and minutes is not None:
        raise BadInput("is for one process", field="--minutes", hint="Give --steps or --tokens.")
    if request.base is None and request.out is None and request.layers.get("data"):
        request = replace(request, out=Path("runs") / name_of(request.layers["data"]["sources"]))
    new = request.fresh or request.out is None or not (Run(request.out).exists or request.must_resume)
    if new and request.base is None and _set_by(request, "init"):
        request = replace(request, base="continue")
    named = request.base is not None or bool(_set_by(request, "init", "model"))
    wanted = minutes is not None or (not named and request.layers.get("data"))
    if (
        several
        or not new
        or not wanted
        or request.more_steps
        or _set_by(request, *(f"training.{name}" for name in LENGTHS))
    ):
        return request
    if _set_by(request, "init"):
        raise BadInput("cannot say how fast another model trains here", field="--minutes", hint="Give --steps.")
    return _decide(request, minutes or MINUTES)


def _set_by(request: TrainRequest, *keys: str) -> list[str]:
    """Which of these keys, or of sections, the request sets."""
    sections = {
        f"{section}.{key}" for section, part in request.layers.items() if isinstance(part, dict) for key in part
    }
    given = {*request.layers, *sections, *(override.partition("=")[0] for override in request.overrides)}
    return [key for key in keys if any(f"{name}.".startswith(f"{key}.") for name in given)]


def name_of(sources: dict[str, float]) -> str:
    """What a run is called after its sources: the name of the first, without endings."""
    return Path(next(iter(sources))).name.split(".")[0].strip("*?[]") or "pocket"


def _decide(request: TrainRequest, minutes: float) -> TrainRequest:
    names = LADDER if request.base is None else [request.base]
    configs = [build_config(name, list(request.overrides), **request.layers) for name in names]
    speeds = measure_speeds(names[0], request.overrides, configs)
    text, tokens, index = _text_of(configs[0])
    within = [speed * minutes * 60 * SHARE_OF_STEPS for speed in speeds]
    useful = [min(reached, MOST_EPOCHS * tokens) for reached in within]
    parameters = [summarise(config.model, config.data.sequence_length).parameters for config in configs]
    enough = [i for i in range(len(names)) if useful[i] >= TOKENS_PER_PARAMETER * parameters[i]]
    at = max(enough, default=0)
    if request.base is None:
        why = f"the largest with {TOKENS_PER_PARAMETER} tokens for each parameter" if enough else "the smallest"
        logger.info(f"size: {names[at]}, {count(parameters[at])} parameters ({why} in {minutes:g} min)")
    config = resolve_batch(configs[at].with_keys("training", tokens=int(useful[at])), choose_device())
    by_time, by_text = (int(n / config.tokens_per_step) for n in (within[at], MOST_EPOCHS * tokens))
    steps = max(min(by_time, max(by_text, FEWEST_STEPS)), 1)
    speed = f"about {speeds[at]:,.0f} tokens/s here, of a measurement"
    if steps >= by_time:
        logger.info(f"length: {plural(steps, 'step')} ({minutes:g} min at {speed})")
    else:
        rest = "more would learn it by heart" if by_text >= FEWEST_STEPS else "a small text needs so many"
        read = f"{size(text)} of text are read {steps * config.tokens_per_step / tokens:.0f} times; {rest}"
        logger.info(f"length: {plural(steps, 'step')} ({read}; {minutes:g} min are {by_time:,} steps at {speed})")
    if text < SMALL_TEXT:
        logger.info(
            "mode: from nothing; of so little text `--init smollm2` learns more, since it knows English already"
        )
    length = {"steps": steps, "tokens_per_step": config.tokens_per_step}
    return replace(request, base=names[at], layers=_with_length(request.layers, length), index=index)


def _with_length(layers: dict[str, Any], length: dict[str, int]) -> dict[str, Any]:
    """The layers, with a length, and with checkpoints, validations and samples that are due within it."""
    every = max(length["steps"] // 5, 1)
    due = {name: {"every": every} | layers.get(name, {}) for name in ("checkpoint", "evaluation", "samples")}
    return {**layers, **due, "training": {**layers.get("training", {}), **length}}


def measure_speeds(name: str, overrides: Sequence[str], configs: Sequence[RunConfig]) -> list[float]:
    """Tokens per second of each configuration: of the first as measured, of the others by their arithmetic."""
    first = configs[0]
    length = first.data.sequence_length
    batch = max(min(first.sequences_per_step, 4), 1)
    with quiet(logging.WARNING), torch.random.fork_rng(devices=[]):  # the measurement's own lines are not the run's
        measured = measure_speed(name, length=length, micro_batch=batch, steps=8, overrides=overrides)
    flops = [flops_per_token(config.model, config.data.sequence_length)["training"] for config in configs]
    return [measured["tokens_per_second"] * flops[0] / own for own in flops]


def _text_of(config: RunConfig) -> tuple[int, int, dict[str, Any]]:
    """Bytes and (about) tokens of the text that is trained on, and its index."""
    with quiet(logging.ERROR, local.__name__):  # the run opens its text again, and tells what is left out
        corpus = Corpus.open(keep_places(config).data)
    with corpus:
        sizes = measure(corpus, None)
    return sum(source.bytes for source in sizes), sum(source.tokens for source in sizes), corpus.index
