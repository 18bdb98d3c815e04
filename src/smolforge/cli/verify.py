"""smolforge verify: compare every byte of a run's checkpoints with what was written."""

from __future__ import annotations

import argparse
from typing import Any

from smolforge.cli.options import add_json, print_result


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "verify",
        help="check every byte of a run or checkpoint",
        description="Compare each file with the size and sha256 in its manifest. Exit code 2 if any differs.",
    )
    parser.add_argument("path", metavar="RUN|CHECKPOINT", help="directory to check")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify."""
    from smolforge.checkpoint.verify import verify_tree

    found = verify_tree(args.path)
    print_result(args, found.as_json(), "\n".join(found.lines()))
    return 0 if found.whole else 2
