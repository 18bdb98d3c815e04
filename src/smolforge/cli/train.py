"""smolforge train: start a run, or resume one."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

from smolforge.cli.options import (
    above_zero,
    add_device,
    add_json,
    add_run,
    add_usual,
    parse_positive,
    parse_seconds,
    parse_sources,
    parse_step_range,
    usual_layers,
)
from smolforge.errors import BadInput

if TYPE_CHECKING:
    from smolforge.training.setup import TrainRequest

EXAMPLES = """\
examples:
  smolforge train                                   the pocket preset on the embedded corpus
  smolforge train --data my_texts/                  your own text; size and length follow from it
  smolforge train --data my_texts/ --minutes 30     the most that half an hour gives
  smolforge train smollm2-135m --tokens 1B          SmolLM2-135M on Cosmopedia-v2
  smolforge train smollm2-135m --data A.parquet=0.7 B.jsonl=0.3 --set optimizer.lr=1e-3
  smolforge train --out runs/pocket --steps +50     fifty more steps on an existing run
  smolforge train --out runs/pocket --cooldown 20%   a fifth more, in which the learning rate falls to zero
  smolforge train my_run.yaml --time-limit 3h50m    save and stop before a scheduler kills the job
  smolforge train smollm2-135m --nproc 8            on eight GPUs; several machines: docs/scale.md

An existing run is continued: weights, moments, schedule and the position in the data are exactly
those of a run that was never interrupted. A data source is a file, folder or glob (text,
tables and documents of any kind), a URL, hf://datasets/OWNER/NAME[@REV]/PATH, OWNER/NAME:CONFIG, or `tales`.
Presets and all keys of --set: docs/configuration.md, or `smolforge summary PRESET`.
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "train",
        help="start a run, or resume one",
        description="Train a model; an existing run continues exactly where it stopped.",
        epilog=EXAMPLES,
    )
    base = parser.add_argument(
        "base", nargs="?", metavar="PRESET|FILE.yaml", help="what to train (default: what suits --data)"
    )
    base.is_name = _is_base  # type: ignore[attr-defined]
    parser.add_argument("--data", nargs="+", action="extend", metavar="SRC[=WEIGHT]", help="sources of text")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", metavar="N|+N", help="length of the run in steps; +N adds N to an existing run")
    length.add_argument("--tokens", metavar="N", help="length of the run in tokens: 500k, 10M, 1B")
    length.add_argument(
        "--minutes", type=above_zero, metavar="X", help="train for about so long; without a preset the size follows too"
    )
    length.add_argument(
        "--cooldown",
        metavar="N|X%",
        help="end a run: let its learning rate fall to zero over N more steps, or X%% of its own",
    )
    parser.add_argument("--init", metavar="MODEL", help="start from the weights of a model directory or Hub id")
    add_usual(parser, epochs="by an estimate", lr="optimizer.lr", batch="training.tokens_per_step", length=length)
    add_run(parser, out="runs/PRESET", setting="optimizer.lr=1e-3")
    parser.add_argument(
        "--skip-steps", action="append", default=[], metavar="A:B",
        help="leave out the data of steps A to B-1, of a run that leaves nothing out",
    )  # fmt: skip
    parser.add_argument(
        "--accept-changed-data", action="store_true", help="continue a run although its data changed; it is recorded"
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a trace of a few steps to RUN/profile, for ui.perfetto.dev"
    )
    parser.add_argument(
        "--serve", nargs="?", type=int, const=8000, metavar="PORT",
        help="while it trains, serve the newest checkpoint on 127.0.0.1 (default port 8000)",
    )  # fmt: skip
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train."""
    layers = usual_layers(args)
    more_steps = None
    if args.steps is not None and args.steps.startswith("+"):
        more_steps = parse_positive(args.steps[1:], "--steps")
    elif args.cooldown is not None:
        more_steps = _parse_cooldown(args.cooldown)
    elif args.steps is not None:
        layers.setdefault("training", {})["steps"] = parse_positive(args.steps, "--steps")
    elif args.tokens is not None:
        layers.setdefault("training", {})["tokens"] = parse_positive(args.tokens, "--tokens")
    if args.data:
        layers["data"] = {"sources": parse_sources(args.data)}
    if args.init:
        layers["init"] = args.init
    windows = None if args.batch_size is None else parse_positive(args.batch_size, "--batch-size")
    time_limit = parse_seconds(args.time_limit, "--time-limit") if args.time_limit else None
    skip = [parse_step_range(text, "--skip-steps") for text in args.skip_steps]
    from smolforge.training.auto import choose
    from smolforge.training.launch import launch
    from smolforge.training.setup import TrainRequest, choose_run
    from smolforge.training.train import run_training

    request = TrainRequest(
        base=args.base,
        overrides=args.overrides,
        layers=layers,
        out=args.out,
        fresh=args.fresh,
        must_resume=args.resume,
        more_steps=more_steps,
        cooldown=args.cooldown is not None,
        time_limit=time_limit,
        skip=skip,
        accept_changed_data=args.accept_changed_data,
        profile=args.profile,
        command=shlex.join(["smolforge", *args.words]),
    )
    if windows is not None:
        request = _with_batch(request, windows)
    if args.dry_run:
        from smolforge.training.dry_run import rehearse

        rehearse(choose(request, args.minutes))
        return 0
    if (code := launch(request, args.nproc, args.words)) is not None:
        return code
    request = choose(request, args.minutes)
    with contextlib.ExitStack() as stack:
        if args.serve is not None and os.environ.get("RANK", "0") == "0":
            from smolforge.serving.sidecar import sidecar

            stack.enter_context(sidecar(choose_run(request), args.serve))
        finished, shutdown = run_training(request)
    if args.json:
        print_outcome(finished)
    sys.stdout.flush()
    return shutdown.exit_code


def _is_base(word: str) -> bool:
    """Whether a word that could be a source names what to train instead."""
    from smolforge.config import preset_names

    return word.endswith((".yaml", ".yml")) or word in preset_names()


def _with_batch(request: TrainRequest, windows: int) -> TrainRequest:
    """The request, with so many windows of the run's or the preset's length in one update."""
    from dataclasses import replace

    from smolforge.config import build_config
    from smolforge.training.setup import base_of

    tokens = windows * build_config(base_of(request), list(request.overrides)).data.sequence_length
    training = {**request.layers.get("training", {}), "tokens_per_step": tokens}
    return replace(request, layers={**request.layers, "training": training})


def _parse_cooldown(text: str) -> int | str:
    """Steps, or a share of them as it was written; BadInput where it is neither."""
    if not text.endswith("%"):
        return parse_positive(text, "--cooldown")
    if not re.fullmatch(r"\d+(\.\d+)?%", text) or not float(text[:-1]):
        hint = "Write steps such as 500, or a share of the run's steps such as 20%."
        raise BadInput(f"{text!r} is not a share above 0%", field="--cooldown", hint=hint)
    return text


def print_outcome(finished: Any) -> None:
    """Print the last metrics of a run as one JSON object, in one of its processes."""
    if os.environ.get("RANK", "0") != "0":
        return
    import json

    from smolforge.metrics_log import read_metrics

    rows = read_metrics(finished)
    steps = [row for row in rows if "loss" in row]
    scores = [row for row in rows if "validation" in row]
    last = {k: steps[-1][k] for k in ("step", "tokens", "loss", "tokens_per_second")} if steps else {}
    outcome = {"run": str(finished.path), "report": str(finished.report_path), **last}
    if scores:
        outcome |= {name: scores[-1][name] for name in ("validation", "average") if name in scores[-1]}
        if "entropy_bits_per_byte" in scores[-1]:
            outcome["entropy_bits_per_byte"] = scores[-1]["entropy_bits_per_byte"]
    print(json.dumps(outcome))
