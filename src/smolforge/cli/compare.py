"""smolforge compare: runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "compare",
        help="runs side by side",
        description="Last losses, bits per byte, speed, and where the configurations differ.",
        epilog="example:\n  smolforge compare runs/a runs/b --html compare.html\n",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write one page with the curves laid over each other"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare."""
    from smolforge.report import compare, write_comparison

    print(compare(args.runs))
    if args.html:
        write_comparison(args.runs, args.html)
        print(f"page: {args.html}", file=sys.stderr)
    return 0
