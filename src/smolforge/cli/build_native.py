"""smolforge build-native: compile the native step ahead of time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  smolforge build-native                       into the user's cache, where it is looked for
  smolforge build-native --directory native/   for an image that is built before it has a home

The native step writes several times as fast as torch's own kernels on a CPU. It is compiled on first use, for the
processor at hand, by $CXX, g++, clang++ or c++; without a compiler torch does the work.
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "build-native",
        help="compile the fast decoder of this CPU ahead of time",
        description="Compile the native step for this processor, or find it compiled, and print where it lies.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to put it (default: the user's cache)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build."""
    import json

    from smolforge.generation.build import build_native

    print("compiling where it is not compiled yet (half a minute)", file=sys.stderr)
    path = build_native(args.directory)
    print(json.dumps({"library": str(path)}) if args.json else path)
    return 0
