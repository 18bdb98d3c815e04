"""smolforge plan: what a run would decide, take and cost, on this machine or on GPUs that need not be here."""

from __future__ import annotations

import argparse
from typing import Any

from smolforge.cli.options import above_zero, add_json, parse_positive, print_result
from smolforge.errors import BadInput

EXAMPLES = """\
examples:
  smolforge plan smollm2-135m --on H100
  smolforge plan smollm2-360m --on 8xA100-80GB --tokens 20B --price 1.8
  smolforge plan seed-recipe --on T4 --set training.precision=fp16
  smolforge plan llama-13m --tokens 20M --on cpu
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "plan",
        help="batch, memory, time and cost of a run before it begins",
        description="What `smolforge train` would decide on GPUs that need not be here, and how long that would take.\n"
        "The time assumes a share of the GPUs' peak; small models reach much less of it. With --on cpu some steps are\n"
        "timed on this machine.",
        epilog=EXAMPLES,
    )
    parser.add_argument("base", nargs="?", default="smollm2-135m", metavar="PRESET|FILE.yaml", help="what to train")
    parser.add_argument("--on", required=True, metavar="[Nx]GPU", help="T4, H100, 8xH100, A100-80GB, ..., or cpu")
    parser.add_argument("--tokens", metavar="N", help="length of the run (default: the preset's)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as of train")
    parser.add_argument("--mfu", type=above_zero, metavar="X", help="share of the peak (as measured on an H100)")
    parser.add_argument("--price", type=above_zero, default=0.0, metavar="X", help="of one GPU for an hour")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the forecast."""
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise BadInput(f"{args.mfu:g} is not a share of the peak", field="--mfu", hint="Give a number up to 1, as 0.4.")
    from smolforge.config import build_config
    from smolforge.training.forecast import forecast, parse_gpus

    gpus, gpu = parse_gpus(args.on)
    layers = {"training": {"tokens": parse_positive(args.tokens, "--tokens")}} if args.tokens else {}
    found = forecast(build_config(args.base, args.overrides, **layers), gpus, gpu, mfu=args.mfu, price=args.price)
    print_result(args, found.as_dict(), "\n".join(found.lines()))
    return 0
