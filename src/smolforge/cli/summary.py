"""smolforge summary: what a model is, before anything is trained."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from smolforge.cli.options import add_json, print_result


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "summary",
        help="module tree, parameters, FLOPs and memory of a model",
        description="The module tree of a preset or model, its parameters, the arithmetic of a token, and the memory\n"
        "to train and to serve it. Nothing is loaded or allocated.",
        epilog="examples:\n  smolforge summary smollm2-135m\n  smolforge summary runs/pocket --json\n",
    )
    parser.add_argument("model", metavar="PRESET|MODEL", help="a preset, a YAML file, a run or a model")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="sequence length for FLOPs and memory")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Summarise."""
    from smolforge.model.architecture import build_model
    from smolforge.model.summary import summarise, tree

    config = _shape(args.model)
    summary = summarise(config, args.length)
    modules = tree(build_model(config, device="meta", seed=None))
    print_result(args, dataclasses.asdict(summary), "\n".join([modules, *summary.lines()]))
    return 0


def _shape(word: str) -> Any:
    from smolforge import config as configuration

    looks_like_file = word.endswith((".yaml", ".yml"))
    if looks_like_file or word in configuration.preset_names():
        return configuration.build_config(word).model
    from smolforge.checkpoint import format, locate
    from smolforge.hub import is_model_id

    if not Path(word).exists() and not is_model_id(word):
        return configuration.build_config(word).model  # its error lists the presets
    return format.read_config(locate.resolve_model(word))
