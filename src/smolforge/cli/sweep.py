"""smolforge sweep: the same run with other values, and which of them are best."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from smolforge.cli.options import add_device, add_json, parse_positive, print_result

logger = logging.getLogger(__name__)

EXAMPLES = """\
a file of a sweep, lr.yaml:
  base: llama-5m                       # preset or YAML file of a run (default pocket)
  data: [books.txt]                    # sources (default: those of the base)
  set: {training.steps: 600}           # keys that all trials share
  keys:                                # what is tried: a list, or a range
    optimizer.lr: {log: [0.001, 0.01], points: 4}
    optimizer.weight_decay: [0.01, 0.1]
  method: grid                         # or random, with trials: 12
  seeds: 2                             # trials of each combination, for a mean and a spread
  halving: {steps: 100, factor: 3}     # only the best third goes on from step 100, of these from step 300

examples:
  smolforge sweep lr.yaml --dry-run    the trials, and how long they take
  smolforge sweep lr.yaml              into sweeps/lr; the same command continues it after a stop
  smolforge train sweeps/lr/best.yaml  a run with the best values

Each trial is a run in DIR/trials, and its output is in DIR/logs. DIR/sweep.md has the table, DIR/sweep.html the curves.
docs/sweep.md says more.
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "sweep",
        help="try values of keys, and keep the best",
        description="Train one configuration with other values of some keys, several trials at a time where they fit,\n"
        "and rank the values by held-out text.",
        epilog=EXAMPLES,
    )
    parser.add_argument("file", metavar="FILE.yaml", type=Path, help="keys, values and seeds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the sweep (default: sweeps/FILE)")
    parser.add_argument("--jobs", metavar="N", help="trials at a time (default: what cores and memory allow)")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and their cost; train nothing")
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sweep, print its table, and write what it found."""
    from smolforge.formatting import count, duration, plural
    from smolforge.report.sweep import markdown
    from smolforge.training import sweep as sweeps
    from smolforge.training.sweep_file import read_sweep

    sweep, folder = read_sweep(args.file), args.out or Path("sweeps") / args.file.stem
    candidates = sweeps.open_sweep(sweep, folder)
    jobs, why = sweeps.count_jobs(candidates)
    if args.jobs:
        jobs, why = parse_positive(args.jobs, "--jobs"), "as asked"
    logger.info(f"trials at a time: {jobs} ({why})")
    if not args.dry_run:
        rows = sweeps.run_sweep(sweep, folder, candidates, jobs)
        text = f"{markdown(rows, sweep.metric.replace('_', ' '))}\n{folder / 'sweep.html'}\n{folder / 'best.yaml'}"
        print_result(args, {"sweep": str(folder), "metric": sweep.metric, "candidates": rows}, text)
        return 0
    cost = sweeps.forecast_sweep(sweep, candidates)
    lines = [trial.name for candidate in candidates for trial in candidate.trials if candidate.configs]
    lines += [f"{candidate.values} cannot be: {candidate.error}" for candidate in candidates if candidate.error]
    lines += [f"round: {plural(many, 'candidate')} to step {end:,}" for many, end in cost["rounds"]]
    lines.append(
        f"{plural(cost['trials'], 'trial')}, {count(cost['tokens'])} tokens in all, about "
        f"{duration(cost['seconds'])} on this machine"
    )
    print_result(args, cost, "\n".join(lines))
    return 0
