"""smolforge build-native: compile the native code ahead of time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from smolforge.cli.options import add_json, print_result

EXAMPLES = """\
examples:
  smolforge build-native                       into the user's cache, where smolforge looks for it
  smolforge build-native --directory native/   into another folder

An installed wheel brings native code for most processors and needs no compiler; SMOLFORGE_KERNELS=native prefers what
this command compiles. An installation from source compiles when it first needs the code; this command does it before,
for example while an image is built. It uses $CXX, g++, clang++, c++ or the package ziglang (pip install ziglang).
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "build-native",
        help="compile the native code for this processor ahead of time",
        description="Compile the native code for this processor, unless it is compiled already, and print its path.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to put it (default: the user's cache)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compile, and print the path."""
    from smolforge.kernels.build import build

    path = str(build(args.directory))
    print_result(args, {"library": path}, path)
    return 0
