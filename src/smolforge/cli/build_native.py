"""smolforge build-native: compile the native code ahead of time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from smolforge.cli.options import add_json, print_result

EXAMPLES = """\
examples:
  smolforge build-native                       into the user's cache, where it is looked for
  smolforge build-native --directory native/   for an image that is built before it has a home

The native step writes several times as fast as torch's own kernels on a CPU. Training gains a loss, an update of bf16
weights and, where the processor multiplies bf16, an attention. All are compiled on first use, for the processor at
hand, by $CXX, g++, clang++, c++ or the package ziglang (pip install ziglang), a compiler that needs no administrator;
without one torch does the work.
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "build-native",
        help="compile the fast code of this CPU ahead of time",
        description="Compile the native code for this processor, or find it compiled, and print where it lies.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to put it (default: the user's cache)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build."""
    from smolforge.kernels.build import build

    path = str(build(args.directory))
    print_result(args, {"library": path}, path)
    return 0
