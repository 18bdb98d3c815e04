"""smolforge presets and config: what ships with smolforge to train, and every key of a configuration."""

from __future__ import annotations

import argparse
from typing import Any

from smolforge.cli.options import add_json, print_result


def add(verbs: Any) -> None:
    """Describe the two verbs' arguments."""
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
    for parser in (presets, config):
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
        sections = {record.key.partition(".")[0] for record in records}
        raise unknown("key", args.key, [record.key for record in records] + sorted(sections), field="KEY")
    lines = []
    for record in found:
        default = "" if record.default is None else f" (default {record.default})"
        lines += [
            f"{record.key}: {record.allowed}{default}",
            textwrap.indent(textwrap.fill(record.meaning, 96), "    "),
        ]
    print_result(args, {"keys": [record._asdict() for record in found]}, "\n".join(lines))
    return 0
