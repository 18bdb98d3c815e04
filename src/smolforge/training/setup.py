"""From what a user asked to a session that is ready to step: the place, the configuration, the data, the model.

A run that exists is gone on with: its saved configuration is the base, and what the command line says on top may change
how the run goes on (its length, learning rate, logging) but not what it is (model, tokenizer, data, global batch).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from smolforge import config as configuration
from smolforge import evaluation
from smolforge.checkpoint import commit, format, locate
from smolforge.config import RunConfig, TokenizerConfig
from smolforge.data import Corpus
from smolforge.distributed import DistributedContext
from smolforge.errors import BadInput, SmolforgeError
from smolforge.evaluation import EvalSlice
from smolforge.files import write_atomically
from smolforge.model.architecture import CausalLM, build_model
from smolforge.run import Run
from smolforge.tokenizer import Tokenizer
from smolforge.training import allocator, optim, plan
from smolforge.training.plan import Plan
from smolforge.training.shutdown import StopRequested
from smolforge.training.state import assign

Say = Callable[[str], None]

# What a run is. Changing one of these makes another run, whose checkpoints do not fit.
IDENTITY = (
    "model", "tokenizer", "init", "training.tokens_per_step", "training.seed",
    "data.sources", "data.text_column", "data.separator", "data.sequence_length", "data.lanes", "data.holdout",
    "data.seed", "data.mask_documents",
)  # fmt: skip


@dataclass(frozen=True)
class TrainRequest:
    """What a user asked of `smolforge train`.

    Attributes:
        base: preset or YAML file; None for the run's own configuration, or `pocket` for a new run.
        overrides: `key=value` of --set.
        layers: sections from other options, such as {"training": {"steps": 100}}.
        out: directory of the run; derived from the base where None.
        fresh: start over; an earlier run in the way is moved aside.
        must_resume: an error where there is no run to go on with.
        more_steps: train so many steps beyond the newest checkpoint.
        time_limit: seconds after which to save and stop.
        skip: ranges of steps whose data is left out.
        profile: write a trace of a few steps into the run.
        command: what was typed, for the report; None from Python.
    """

    base: str | None = None
    overrides: Sequence[str] = ()
    layers: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    fresh: bool = False
    must_resume: bool = False
    more_steps: int | None = None
    time_limit: float | None = None
    skip: Sequence[tuple[int, int]] = ()
    profile: bool = False
    command: str | None = None


@dataclass
class TrainContext:
    """Everything that the steps of a run need, opened."""

    run: Run
    config: RunConfig
    plan: Plan
    ranks: DistributedContext
    corpus: Corpus
    tokenizer: Tokenizer
    model: CausalLM
    optimizer: torch.optim.Optimizer
    slice: EvalSlice | None
    scaler: torch.amp.GradScaler | None
    say: Say


def choose_place(request: TrainRequest) -> Run:
    """The directory of the run: as asked, or runs/NAME after the preset or file."""
    if request.out is not None:
        return Run(request.out)
    base = request.base or "pocket"
    path = Path(base)
    if path.name == "config.yaml" and Run(path.parent).exists:
        # Repeating a run is another run: it goes beside the first.
        number = 2
        while (path.parent.parent / f"{path.parent.name}-{number}").exists():
            number += 1
        return Run(path.parent.parent / f"{path.parent.name}-{number}")
    return Run(Path("runs") / path.stem)


def move_aside(run: Run, say: Say) -> None:
    """Make room for a fresh run; nothing is deleted."""
    if not run.path.exists():
        return
    run.check_place()
    number = 1
    while (target := run.path.with_name(f"{run.path.name}.before-{number}")).exists():
        number += 1
    run.path.rename(target)
    say(f"the earlier run is kept in {target}")


def resolve_config(request: TrainRequest, run: Run, newest: Path | None) -> RunConfig:
    """The configuration to go by: the run's own with changes on top, or a new one.

    Raises:
        BadInput: the directory holds a run that what was asked does not go on with.
    """
    if not run.exists:
        if request.must_resume:
            raise BadInput(f"{run.path} holds no run to resume", field="--resume")
        return configuration.build_config(request.base or "pocket", list(request.overrides), **request.layers)
    saved = configuration.build_config(str(run.config_path))
    if request.base is not None and _name(request.base) != saved.preset and Path(request.base) != run.config_path:
        raise BadInput(
            f"{run.path} belongs to another run, begun from {saved.preset}",
            field="out",
            hint="Give another directory with --out, or --fresh to start over (the old run is moved aside).",
        )
    changed = configuration.build_config(str(run.config_path), list(request.overrides), **request.layers)
    before, after = (_flat(c.model_dump(mode="json")) for c in (saved, changed))
    strange = [
        key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key) and _is_identity(key)
    ]
    if strange and newest is not None:
        key = strange[0]
        raise BadInput(
            f"{run.path} was begun with {before.get(key)!r}, not {after.get(key)!r}",
            field=key,
            hint="That would be another run: give another directory with --out, or --fresh to start over.",
        )
    if request.more_steps is not None:
        done = (commit.step_of(newest) or 0) if newest else 0
        training = changed.training.model_copy(update={"steps": done + request.more_steps, "tokens": None})
        changed = changed.model_copy(update={"training": training})
    return changed


def open_tokenizer(
    config: RunConfig, corpus: Corpus, run: Run, newest: Path | None, ranks: DistributedContext, say: Say
) -> Tokenizer:
    """The run's tokenizer: the checkpoint's, the one trained earlier, a named one, or one trained now.

    Raises:
        BadInput: its vocabulary is larger than the model's.
    """
    kept = run.path / "tokenizer"
    if newest is not None:
        tokenizer = Tokenizer.from_pretrained(newest)
    elif isinstance(config.tokenizer, str):
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    else:
        if ranks.is_main and not (kept / "tokenizer.json").is_file():
            _train_tokenizer(config.tokenizer, corpus, say).save(kept)
        ranks.barrier()
        tokenizer = Tokenizer.from_pretrained(kept)
    format.check_vocabulary(config.model, tokenizer)
    return tokenizer


def _train_tokenizer(config: TokenizerConfig, corpus: Corpus, say: Say) -> Tokenizer:
    wanted = config.train.documents
    say(f"tokenizer: training {config.train.vocab_size:,} tokens on {wanted:,} documents")
    return Tokenizer.train(islice(corpus.texts(held_out=False), wanted), config.train.vocab_size)


def new_model(config: RunConfig, chosen: Plan, newest: Path | None, say: Say) -> CausalLM:
    """The model with new weights, with those of `init`, or, where there is a checkpoint to restore, with none yet."""
    fresh = newest is None
    model = build_model(
        config.model,
        dtype=chosen.precision.weights,
        device=chosen.device,
        seed=config.training.seed if fresh and config.init is None else None,
        **chosen.model_options,
    )
    if fresh and config.init is not None:
        assign(model, locate.resolve_model(config.init))
        say(f"weights and tokenizer: from {config.init}")
    return model


def adopt_init(config: RunConfig, newest: Path | None) -> RunConfig:
    """Take shape and tokenizer from `init`, so that continuing a model needs no other option.

    The tokenizer is always the model's own: to another one its embedding means nothing. A run that has a checkpoint
    has adopted both already, and goes on where `init` is gone.
    """
    if config.init is None or newest is not None:
        return config
    directory = locate.resolve_model(config.init)
    model = format.read_config(directory)
    positions = model.max_position_embeddings
    if config.data.sequence_length > positions:
        raise BadInput(
            f"{config.data.sequence_length} is longer than the {positions} positions of {config.init}",
            field="data.sequence_length",
            hint=f"Add --set data.sequence_length={positions}.",
        )
    tokenizer = str(directory) if Path(config.init).expanduser().exists() else config.init
    return config.model_copy(update={"model": model, "tokenizer": tokenizer})


def open_session(
    run: Run, config: RunConfig, newest: Path | None, ranks: DistributedContext, device: torch.device, say: Say
) -> TrainContext:
    """Open everything in the order in which it can fail; what fails before the run is begun leaves no trace.

    Raises:
        SmolforgeError: something cannot be opened.
    """
    try:
        return _open_session(run, config, newest, ranks, device, say)
    except (SmolforgeError, StopRequested):
        if ranks.is_main and not run.exists:
            _forget(run)
        raise


def _forget(run: Run) -> None:
    """Remove what a beginning that failed has made: a corrected command must find the place as it was."""
    run.index_path.unlink(missing_ok=True)
    for folder in (run.path / "tokenizer", run.path / "cache", run.checkpoints_path):
        shutil.rmtree(folder, ignore_errors=True)


def _open_session(
    run: Run, config: RunConfig, newest: Path | None, ranks: DistributedContext, device: torch.device, say: Say
) -> TrainContext:
    chosen = plan.make_plan(config, device, ranks.world)
    index = ranks.broadcast(run.read_index() if ranks.is_main else None)
    cache = run.path / "cache"
    if ranks.is_main:
        corpus = Corpus.open(config.data, index=index, cache_dir=cache)
        if index is None:
            run.write_index(corpus.index)
    index = ranks.broadcast(corpus.index if ranks.is_main else None)
    if not ranks.is_main:
        corpus = Corpus.open(config.data, index=index, cache_dir=cache)
    tokenizer = open_tokenizer(config, corpus, run, newest, ranks, say)
    for reason in chosen.reasons:
        say(reason)
    torch.set_num_threads(chosen.threads)
    if chosen.device.type == "cpu":
        allocator.keep_freed_memory()
    torch.set_float32_matmul_precision(chosen.precision.matmul)
    model = new_model(config, chosen, newest, say)
    count = sum(p.numel() for p in model.parameters())
    say(f"model: {config.model.architecture}, {count:,} parameters, {config.model.num_hidden_layers} layers")
    optimizer = optim.build_optimizer(model, config.optimizer, device)
    held_out = None
    if config.data.holdout:
        held_out = evaluation.tokenize_eval_set(corpus.texts(held_out=True), tokenizer, config.evaluation.tokens)
    scaler = torch.amp.GradScaler(device.type) if chosen.precision.scaler else None
    return TrainContext(run, config, chosen, ranks, corpus, tokenizer, model, optimizer, held_out, scaler, say)


def write_environment(session: TrainContext, command: str | None) -> None:
    """Keep what the run ran on, for the report."""
    environment = {
        "smolforge": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": str(session.plan.device),
        "threads": session.plan.threads,
        "command": command,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "pid": os.getpid(),
        "decisions": session.plan.reasons,
    }
    write_atomically(session.run.path / "environment.json", json.dumps(environment, indent=2) + "\n")


def _version() -> str:
    from importlib.metadata import version

    return version("smolforge")


def _name(base: str) -> str:
    return Path(base).stem if base.endswith((".yaml", ".yml")) or "/" in base else base


def _is_identity(key: str) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in IDENTITY)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
