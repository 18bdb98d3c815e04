"""smolforge verify: is every byte of a run's checkpoints the one that was written?"""

from __future__ import annotations

import argparse
from typing import Any


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "verify",
        help="check every byte of a run or checkpoint",
        description="Compare each file with the size and sha256 that its manifest says. Exit code 2 if any differs.",
    )
    parser.add_argument("path", metavar="RUN|CHECKPOINT", help="directory to check")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify."""
    import json

    from smolforge.checkpoint.verify import verify_tree

    found = verify_tree(args.path)
    print(json.dumps(found.as_json()) if args.json else "\n".join(found.lines()))
    return 0 if found.whole else 2
