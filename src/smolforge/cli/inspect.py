"""smolforge presets, config, summary, compare and verify: what there is to train, what models and runs are."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from smolforge.cli.options import add_json, positive, print_result


def add(verbs: Any) -> None:
    """Describe the five verbs' arguments."""
    presets = verbs.add_parser(
        "presets",
        help="what there is to train",
        description="The presets, each with its size, its context and the length of its run.",
        epilog="examples:\n  smolforge presets\n  smolforge summary pocket\n  smolforge train pocket --data texts/\n",
    )
    presets.set_defaults(run=_presets)
    config = verbs.add_parser(
        "config",
        help="the keys of a configuration",
        description="Keys of a configuration (for a YAML file or --set): allowed values, default, meaning.",
        epilog="examples:\n  smolforge config\n  smolforge config optimizer\n  smolforge config training.precision\n",
    )
    config.add_argument("key", nargs="?", metavar="KEY", help="a key or a section (default: all)")
    config.set_defaults(run=_config)
    summary = verbs.add_parser(
        "summary",
        help="module tree, parameters, FLOPs and memory of a model",
        description="The module tree of a preset or model, its parameters, the arithmetic of a token, and the memory\n"
        "to train and to serve it. Nothing is loaded or allocated.",
        epilog="examples:\n  smolforge summary smollm2-135m\n  smolforge summary runs/pocket --json\n",
    )
    summary.add_argument("model", metavar="PRESET|MODEL", help="a preset, a YAML file, a run or a model")
    summary.add_argument("--length", type=positive, default=2048, metavar="N", help="length for FLOPs and memory")
    summary.set_defaults(run=_summary)
    compare = verbs.add_parser(
        "compare",
        help="runs side by side",
        description="Last losses, bits per byte, speed, and where the configurations differ.",
        epilog="example:\n  smolforge compare runs/a runs/b --html compare.html\n",
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs")
    compare.add_argument(
        "--html", type=Path, metavar="FILE", help="also write one page with the curves laid over each other"
    )
    compare.set_defaults(run=_compare)
    verify = verbs.add_parser(
        "verify",
        help="check every byte of a run or checkpoint",
        description="Compare each file with the size and sha256 in its manifest. Exit code 2 if any differs.",
    )
    verify.add_argument("path", metavar="RUN|CHECKPOINT", help="directory to check")
    verify.set_defaults(run=_verify)
    for parser in (presets, config, summary, compare, verify):
        add_json(parser)


def _presets(args: argparse.Namespace) -> int:
    from smolforge.config import build_config, preset_about, preset_names
    from smolforge.formatting import count
    from smolforge.model.summary import count_parameters

    found = []
    for name in preset_names():
        config = build_config(name)
        tunes = config.data.format != "text"  # a model of any size
        parameters = None if tunes else count_parameters(config.model)
        length = config.data.sequence_length
        found.append({"preset": name, "parameters": parameters, "context": length, "about": preset_about(name)})
    found.sort(key=lambda preset: preset["parameters"] or 0)
    lines = [f"{'preset':<16} {'parameters':>10} {'context':>8}  about"]
    lines += [f"{p['preset']:<16} {count(p['parameters']):>10} {p['context']:>8,}  {p['about']}" for p in found]
    print_result(args, {"presets": found}, "\n".join(lines))
    return 0


def _config(args: argparse.Namespace) -> int:
    import textwrap

    from smolforge.config import key_records
    from smolforge.errors import unknown

    records = key_records()
    found = [r for r in records if args.key is None or r.key == args.key or r.key.startswith(f"{args.key}.")]
    if args.key is not None and not found:
        known = {name for record in records for name in (record.key, record.key.partition(".")[0])}  # sections too
        raise unknown("key", args.key, sorted(known), field="KEY")
    lines = []
    for record in found:
        default = "" if record.default is None else f" (default {record.default})"
        meaning = textwrap.indent(textwrap.fill(record.meaning, 96), "    ")
        lines += [f"{record.key}: {record.allowed}{default}", meaning]
    print_result(args, {"keys": [record._asdict() for record in found]}, "\n".join(lines))
    return 0


def _summary(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from smolforge.model.architecture import build_model
    from smolforge.model.summary import summarise, tree

    config = _model_config(args.model)
    summary = summarise(config, args.length)
    modules = tree(build_model(config, device="meta", seed=None))
    print_result(args, asdict(summary), "\n".join([modules, *summary.lines()]))
    return 0


def _model_config(word: str) -> Any:
    from smolforge.checkpoint import format, locate
    from smolforge.config import build_config, preset_names
    from smolforge.hub import GGUF_ADDRESS, is_model_id

    is_model = Path(word).exists() or is_model_id(word) or GGUF_ADDRESS.match(word)
    if word.endswith((".yaml", ".yml")) or word in preset_names() or not is_model:
        return build_config(word).model  # for an unknown word its error lists the presets
    return format.read_config(locate.resolve_model(word))


def _compare(args: argparse.Namespace) -> int:
    from smolforge.report import compare, comparison, write_comparison

    if args.json:
        print_result(args, comparison(args.runs).as_dict(), "")
    else:
        print(compare(args.runs))
    if args.html:
        write_comparison(args.runs, args.html)
        print(f"page: {args.html}", file=sys.stderr)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from smolforge.checkpoint.locate import verify_tree

    found = verify_tree(args.path)
    print_result(args, asdict(found), "\n".join(found.lines()))
    return 0 if found.whole else 2
