"""Training side by side: smolforge, transformers, LitGPT and the seed's step, on SmolLM2-135M.

    python benchmarks/training/compare.py [--litgpt-python PYTHON] [--precision fp32] [--shape 4x512 2x2048]

Each contestant takes its steps (forward, backward, AdamW) in a process of its own, one after the other, since two would
not fit in memory; with --rounds they take turns. Reported are medians, peak memory of the process, and the first
step, in which a compiler works. LitGPT wants older libraries than we do: it runs where PYTHON can import `litgpt`
(a virtual environment with `pip install torch litgpt`). --memory gives smolforge a second entry under that budget.

Needs about 8 GB of memory for 4x512 and 13 GB for 2x2048. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = [
    "smolforge", "transformers-default", "transformers-eager", "transformers-compiled", "litgpt-eager",
    "litgpt-compiled", "seed",
]  # fmt: skip


def run(name: str, python: str, shape: tuple[int, int], args: argparse.Namespace, more: list[str]) -> dict | None:
    """One contestant's figures, or None where it failed."""
    command = [
        python,
        str(HERE / "peer.py"),
        name,
        *map(str, shape),
        str(args.steps),
        args.precision,
        str(args.threads),
        *more,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        print(f"{name} failed: {' '.join(command)}\n{done.stderr[-800:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print a table, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litgpt-python", default=None)
    parser.add_argument("--precision", choices=("fp32", "bf16", "bf16-pure"), default="fp32")
    parser.add_argument("--shape", nargs="+", default=["4x512", "2x2048"], metavar="SEQUENCESxLENGTH")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory", default=None, metavar="BYTES", help="such as 5GiB: smolforge once more, under this")
    parser.add_argument("--only", nargs="*", default=None, help="contestants to run, by name")
    args = parser.parse_args()
    contestants = {name: (sys.executable, []) for name in NAMES if args.only is None or name in args.only}
    for name in [name for name in contestants if name.startswith("litgpt")]:
        if args.litgpt_python:
            contestants[name] = (args.litgpt_python, [])
        else:
            del contestants[name]
    if args.memory:
        contestants["smolforge-memory"] = (sys.executable, [f"training.memory={args.memory}"])
    result: dict = {"benchmark": "training", "precision": args.precision, "threads": args.threads, "shapes": {}}
    for text in args.shape:
        sequences, length = map(int, text.split("x"))
        figures: dict[str, list[dict]] = {name: [] for name in contestants}
        for _ in range(args.rounds):
            for name, (python, more) in contestants.items():
                one = run(name, python, (sequences, length), args, more)
                if one:
                    figures[name].append(one)
                    print(f"{text} {name}: {one['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
        medians = {
            name: {
                key: statistics.median(one[key] for one in runs)
                for key in ("tokens_per_second", "peak_bytes", "first_step_seconds")
            }
            for name, runs in figures.items() if runs
        }  # fmt: skip
        ours = medians.get("smolforge", {}).get("tokens_per_second")
        print(f"{args.precision}, {sequences} x {length:,} tokens")
        print(f"{'':24} {'tokens/s':>9} {'peak GB':>8} {'first step s':>13} {'smolforge is':>13}")
        for name, one in medians.items():
            times = f"{ours / one['tokens_per_second']:12.2f}x" if ours else ""
            print(
                f"{name:24} {one['tokens_per_second']:9.1f} {one['peak_bytes'] / 1e9:8.1f} "
                f"{one['first_step_seconds']:13.1f} {times}"
            )
        for one in figures.get("smolforge", [])[:1]:
            print(f"smolforge runs at {one['share_of_matmul_limit']:.0%} of the matrix products' own speed")
        result["shapes"][text] = {"medians": medians, "runs": figures}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
