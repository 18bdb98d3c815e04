"""From a request to all that the steps of a run need: configuration, data, tokenizer, model, optimizer.

An existing run is continued: its saved configuration is the base, and the request may change how it continues (length,
learning rate, logging), but not what it is (model, tokenizer, data, global batch).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from smolforge import __version__
from smolforge.checkpoint import commit, format, locate
from smolforge.config import RunConfig, build_config
from smolforge.data import Corpus
from smolforge.distributed import DistributedContext
from smolforge.errors import BadInput, CheckpointError, SmolforgeError
from smolforge.evaluation import EvalSlice
from smolforge.files import write_atomically
from smolforge.metrics_log import read_metrics
from smolforge.model.architecture import CausalLM
from smolforge.run import Run, lock_run
from smolforge.tokenizer import Tokenizer
from smolforge.training import finetuning
from smolforge.training.apply_plan import apply_plan
from smolforge.training.averaging import AveragedWeights
from smolforge.training.optim import build_optimizer, schedule_factor
from smolforge.training.plan import Plan
from smolforge.training.preferences import Preferences, open_preferences
from smolforge.training.prepare import prepare
from smolforge.training.run_data import check_weights, keep_places
from smolforge.training.run_model import base_digest, build_run_model, check_adapter
from smolforge.training.shutdown import StopRequested

logger = logging.getLogger(__name__)

# What a run is. Changing one of these makes another run, whose checkpoints do not fit.
IDENTITY = (
    "model", "tokenizer", "init", "lora", "training.tokens_per_step", "training.seed",
    "data.text_column", "data.separator", "data.sequence_length", "data.lanes", "data.holdout",
    "data.seed", "data.mask_documents", "data.format", "data.loss_on", "data.too_long", "preference",
)  # fmt: skip


@dataclass(frozen=True)
class TrainRequest:
    """What a user asked of `smolforge train`."""

    base: str | None = None  # preset or YAML file; None for the run's own configuration, or `pocket` for a new run
    overrides: Sequence[str] = ()  # `key=value` of --set
    layers: dict[str, Any] = field(default_factory=dict)  # sections of other options: {"training": {"steps": 100}}
    out: Path | None = None  # directory of the run; derived from the base where None
    fresh: bool = False  # start over; an existing run there is moved aside
    must_resume: bool = False
    # So many, or such a share of its steps (`20%`), beyond where the run stood when this was first requested.
    more_steps: int | str | None = None
    cooldown: bool = False  # let the learning rate fall to zero over `more_steps`
    time_limit: float | None = None  # seconds after which to save and stop
    until: int | None = None  # train to this step; the schedule is that of the whole run
    skip: Sequence[tuple[int, int]] = ()  # ranges of steps whose data is left out
    accept_changed_data: bool = False  # continue although the data changed
    profile: bool = False
    command: str | None = None  # the command line, for the report
    index: dict[str, Any] | None = None  # of the data, where it was read already to choose a size and a length
    tokenizer: str | None = None  # directory of the one that this run would train, where it was trained already


@dataclass
class TrainContext:
    """Everything that the steps of a run need."""

    run: Run
    config: RunConfig
    plan: Plan
    ranks: DistributedContext
    corpus: Corpus
    tokenizer: Tokenizer
    model: CausalLM
    optimizer: torch.optim.Optimizer
    eval_set: EvalSlice | None
    scaler: torch.amp.GradScaler | None
    command: str | None
    base: str | None = None
    """Hash of the weights that an adapter learns beside; None where every weight learns."""
    preferences: Preferences | None = None
    """What is learned of pairs of answers; None where the next token is."""
    average: AveragedWeights | None = None


# The run's directory


def choose_run(request: TrainRequest) -> Run:
    """The run's directory: as requested, or runs/NAME after the preset or file."""
    if request.out is not None:
        return Run(request.out)
    path = Path(request.base or "pocket")
    if path.name == "config.yaml" and Run(path.parent).exists:
        # Repeating a run makes another run, next to the first.
        return Run(_first_free(path.parent.parent / f"{path.parent.name}-", 2))
    return Run(Path("runs") / path.stem)


def base_of(request: TrainRequest) -> str:
    """The configuration that a request changes: the run's own where it continues one, else the preset or file."""
    run = choose_run(request)
    return str(run.config_path) if run.exists and not request.fresh else request.base or "pocket"


@contextlib.contextmanager
def cleared_place(run: Run, *, fresh: bool) -> Iterator[None]:
    """Rename an existing run where a fresh one takes its place; nothing is deleted. It is back if the block fails.

    Raises:
        BadInput: the place holds something other than a run, or another process writes it.
    """
    run.check_place()
    if not (fresh and run.exists):
        yield
        return
    with lock_run(run):
        pass  # no other process writes it
    # A symlink stays, and leads to the fresh run where it led to the existing one.
    path = run.path.resolve() if run.path.is_symlink() else run.path
    target = _first_free(path.with_name(f"{path.name}.before-"), 1)
    path.rename(target)
    try:
        path.mkdir()
        logger.info(f"the existing run is now in {target}")
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        target.rename(path)
        logger.info(f"the fresh run could not begin; the existing one is in {path} again")
        raise


def forget_preparations(run: Run) -> None:
    """Remove what was made for a first step that never came to a checkpoint: another start may prepare otherwise.

    Raises:
        CheckpointError: there are checkpoints, which means that all of them are damaged.
    """
    if found := commit.steps(run.checkpoints_path):
        raise CheckpointError(
            f"{run.path} has {len(found)} checkpoints, none of them whole",
            hint=f"`smolforge verify {run.path}` names the damage. --fresh starts over and moves them aside.",
        )
    for path in (run.index_path, run.reference_path):
        path.unlink(missing_ok=True)
    shutil.rmtree(run.path / "tokenizer", ignore_errors=True)


def _first_free(path: Path, start: int) -> Path:
    """The first of PATHstart, PATHstart+1, ... that does not exist."""
    return next(found for n in count(start) if not (found := path.with_name(f"{path.name}{n}")).exists())


# The configuration


def resolve_config(request: TrainRequest, run: Run, newest: Path | None) -> RunConfig:
    """The configuration to train with: the run's own with the request's changes, or a new one.

    Raises:
        BadInput: the directory holds a run that is not the requested one.
    """
    if not run.exists:
        if request.must_resume:
            raise BadInput(f"{run.path} holds no run to resume", field="--resume")
        if request.more_steps is not None:
            option = "--cooldown" if request.cooldown else "--steps"
            raise BadInput(f"{run.path} holds no run to extend", field=option, hint="--steps N without + starts one.")
        return keep_places(build_config(request.base or "pocket", list(request.overrides), **request.layers))
    saved = keep_places(build_config(str(run.config_path)))
    base = request.base or ""
    name = Path(base).stem if base.endswith((".yaml", ".yml")) or "/" in base else base
    if base and name != saved.preset and Path(base) != run.config_path:
        raise BadInput(
            f"{run.path} holds another run, started from {saved.preset}",
            field="out",
            hint="Give another directory with --out, or --fresh to start over (the existing run is moved aside).",
        )
    changed = keep_places(build_config(str(run.config_path), list(request.overrides), **request.layers))
    if newest is not None:
        changed = check_weights(run, saved, changed)
        _check_identity(run, saved, changed)
    if changed.training.steps is None and changed.training.epochs == saved.training.epochs:
        changed = changed.with_keys("training", steps=saved.training.steps)
    if request.more_steps is not None:
        begin, length = _extended_length(run, newest, request.more_steps)
        changed = changed.with_keys("training", steps=length, tokens=None, epochs=None)
        if request.cooldown:
            changed = changed.with_keys("schedule", name="wsd", decay=length - begin, floor=0.0)
    return changed


def _extended_length(run: Run, newest: Path | None, more: int | str) -> tuple[int, int]:
    """Where a run stood when `more` was requested, and its length in steps then.

    Repeating the command of an interrupted run adds nothing.
    """
    done = (commit.step_of(newest) or 0) if newest else 0
    events = [row for row in read_metrics(run) if row.get("event") == "extend"]
    if events and events[-1]["more"] == more and done < events[-1]["length"]:
        begin, length = events[-1]["step"], events[-1]["length"]
        logger.info(f"+{more} steps were already requested at step {begin:,}: {length - done:,} are left")
        return begin, length
    steps = max(round(done * float(more.rstrip("%")) / 100), 1) if isinstance(more, str) else more
    return done, done + steps


def _check_identity(run: Run, saved: RunConfig, changed: RunConfig) -> None:
    before, after = (_flatten(config.model_dump(mode="json")) for config in (saved, changed))
    for key in sorted(before.keys() | after.keys()):
        is_identity = any(key == prefix or key.startswith(f"{prefix}.") for prefix in IDENTITY)
        if not is_identity or before.get(key) == after.get(key):
            continue
        was, wanted = before.get(key), after.get(key)
        message = f"{run.path} was started with {was}, not {wanted}"
        raise BadInput(message, field=key, hint="Give another directory with --out, or --fresh to start over.")


def adopt_init(config: RunConfig, newest: Path | None, request: TrainRequest) -> RunConfig:
    """Take shape and tokenizer from the model `init`, so that continuing a model needs no other option.

    The tokenizer is always that model's own, because its embedding belongs to no other. A run with a checkpoint has
    adopted both already and does not need `init` any more.

    Raises:
        BadInput: the request itself (its preset or file does not count) asks for another shape or tokenizer.
    """
    if config.init is None and config.data.format != "text":
        raise BadInput(
            "chat data needs a model to start from",
            field="init",
            hint="`smolforge finetune MODEL --data SRC` names one.",
        )
    if config.init is None or newest is not None:
        return config
    try:
        directory = locate.resolve_model(config.init)
    except CheckpointError as error:
        error.field = "init" if error.field == "model" else error.field
        raise
    model = format.read_config(directory)
    format.check_no_dropout(directory)
    # A name that is none of the Hub's, such as that of a file which is installed, means the file.
    local = Path(config.init).expanduser().exists() or not directory.is_dir()
    tokenizer = str(directory) if local else config.init
    rows = model.vocab_size
    if config.data.format != "text":
        model = finetuning.with_room(model, finetuning.with_chat_template(Tokenizer.from_pretrained(directory)))
    adopted = config.model_copy(update={"model": model, "tokenizer": tokenizer})
    check_adapter(adopted, rows)
    asked, has = (_flatten(c.model_dump(mode="json", include={"model", "tokenizer"})) for c in (config, adopted))
    named = {override.partition("=")[0].strip() for override in request.overrides} | set(_flatten(request.layers))
    for key in sorted(asked.keys() | has.keys()):
        is_named = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in named)
        if is_named and asked.get(key) != has.get(key):
            raise BadInput(
                f"{config.init} has {has.get(key, tokenizer)}, not {asked.get(key, 'a new one')}",
                field=key,
                hint="A run that starts from a model has its shape and its tokenizer: leave this out.",
            )
    positions = model.max_position_embeddings
    if config.data.sequence_length > positions:
        raise BadInput(
            f"{config.data.sequence_length} is longer than the {positions} positions of {config.init}",
            field="data.sequence_length",
            hint=f"Add --set data.sequence_length={positions}.",
        )
    return adopted


def announce_changes(run: Run, config: RunConfig, step: int) -> None:
    """Say which keys of the configuration differ from those that the run had until `step`."""
    saved = build_config(str(run.config_path))
    before, after = (_flatten(c.model_dump(mode="json", exclude={"data": {"sources"}})) for c in (saved, config))
    for key in after:
        if before.get(key) != after[key]:
            logger.info(f"{key}: {before.get(key)} → {after[key]} from step {step + 1:,} on")
    _announce_rate(saved, config, step)


def _announce_rate(saved: RunConfig, config: RunConfig, step: int) -> None:
    """Say where another length, schedule or peak makes the learning rate jump, which changes what is learned."""
    last, expected, rate = (
        c.optimizer.lr * schedule_factor(c.schedule, at, c.total_steps)
        for c, at in ((saved, step - 1), (saved, min(step, saved.total_steps - 1)), (config, step))
    )
    if step < config.total_steps and abs(rate - expected) > 0.1 * max(rate, expected):
        lengths = f"{saved.total_steps:,} → {config.total_steps:,} steps"
        logger.info(f"learning rate: {last:.2e} at step {step:,}, {rate:.2e} from step {step + 1:,} on ({lengths})")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


# Data, model, optimizer


def build_context(
    request: TrainRequest, run: Run, config: RunConfig, newest: Path | None, ranks: DistributedContext,
    device: torch.device,
) -> TrainContext:  # fmt: skip
    """Open everything in the order in which it can fail. A start that fails leaves nothing in the run's directory."""
    try:
        prepared = prepare(request, run, config, newest, ranks, device)
        config, plan = prepared.config, prepared.plan
        apply_plan(plan)
        learns_pairs = config.data.format == "preferences"
        is_reference = learns_pairs and not run.reference_path.is_file()  # it is computed with the weights of `init`
        model = build_run_model(config, plan, newest, with_init=newest is None or is_reference)
        optimizer = build_optimizer(model, config.optimizer, update=plan.update, products=plan.precision.products)
        ema, preferences = config.training.ema, None
        if learns_pairs:
            preferences = open_preferences(run, config, plan, prepared.corpus, prepared.tokenizer, model, ranks)
    except (SmolforgeError, StopRequested):
        if ranks.is_main and not run.exists:
            forget_preparations(run)
            for folder in (run.path / "cache", run.checkpoints_path):
                shutil.rmtree(folder, ignore_errors=True)
        raise
    scaler = torch.amp.GradScaler(device.type) if plan.precision.scaler else None
    return TrainContext(
        run, config, plan, ranks, prepared.corpus, prepared.tokenizer, model, optimizer, prepared.eval_set, scaler,
        request.command, base_digest(config), preferences,
        AveragedWeights(model, ema, config.total_steps) if ema else None,
    )  # fmt: skip


# What is written


def record(context: TrainContext) -> None:
    """Write down the configuration that the run has from now on and, for the report, what it runs on."""
    if not context.ranks.is_main:
        return
    write_atomically(context.run.config_path, context.config.to_yaml())
    environment = {
        "smolforge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": str(context.plan.device),
        "threads": context.plan.threads,
        "command": context.command,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "pid": os.getpid(),
        "decisions": context.plan.reasons,
    }
    write_atomically(context.run.path / "environment.json", json.dumps(environment, indent=2) + "\n")
