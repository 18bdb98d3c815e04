"""The seed's recipe and ours, on the seed's architecture and on SmolLM2's: which learns more from the same tokens.

    python examples/seed/recipes.py                      all twelve runs, then the table and one JSON line
    python examples/seed/recipes.py --steps 700          shorter
    python examples/seed/recipes.py --seeds 0 --recipes ours --architectures llama     one of them

Every run has the pocket preset's sizes, tokenizer, data, order of the data, global batch and number of tokens; the
seed's batch of 1, accumulated twice, is pocket's too. What differs is the architecture, and the recipe: optimizer
and schedule of the preset `seed-recipe`, with attention across document borders, or those of `pocket`. Runs that are
finished are not run again. No learning claim rests on one seed: the table has mean and standard deviation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from smolforge.config import read_preset
from smolforge.metrics_log import read_metrics
from smolforge.training.api import train

ARCHITECTURES = ("llama", "recreation")
RECIPES = ("seed", "ours")
WORDS = {"llama": "SmolLM2's Llama", "recreation": "the recreation", "seed": "the seed's", "ours": "ours"}


def layers(architecture: str, recipe: str, seed: int, steps: int | None) -> dict[str, Any]:
    """What one run changes of the pocket preset."""
    changes: dict[str, Any] = {
        "model": {"architecture": architecture},
        "training": {"seed": seed, **({"steps": steps} if steps else {})},
        "logging": {"trackers": []},
    }
    if steps:  # the preset's own warmup and intervals, scaled with the run
        share = steps / read_preset("pocket")["training"]["steps"]
        changes["schedule"] = {"warmup": max(1, round(read_preset("pocket")["schedule"]["warmup"] * share))}
        changes["checkpoint"] = {"every": steps}
        changes["evaluation"] = {"every": steps}
        changes["samples"] = {"every": steps}
    if recipe == "seed":
        theirs = read_preset("seed-recipe")
        changes["optimizer"] = {"groups": {}, **theirs["optimizer"]}
        changes["schedule"] = theirs["schedule"]
        changes["data"] = {"mask_documents": False}
    return changes


def measure(place: Path, steps: int | None) -> dict[str, float]:
    """Train one run, or read it where it is finished; its figures."""
    architecture, recipe, seed = place.name.split("-")
    run = train("pocket", out=place, quiet=True, config=layers(architecture, recipe, int(seed), steps))
    rows = read_metrics(run)
    last = [row for row in rows if "validation" in row][-1]
    losses = [row["loss"] for row in rows if "loss" in row][-5:]
    return {
        "held_out_loss": last["validation"]["loss"],
        "bits_per_byte": last["validation"]["bits_per_byte"],
        "training_loss": statistics.mean(losses),
        "tokens": last["tokens"],
        "entropy_bits_per_byte": last.get("entropy_bits_per_byte", float("nan")),
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation, as the table shows them."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main() -> None:
    """Run what was asked for, and print what is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="length of each run (default: the pocket preset's)")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="where the runs are kept")
    args = parser.parse_args()
    table, cells, entropy, tokens = [], {}, float("nan"), 0
    for architecture in args.architectures:
        for recipe in args.recipes:
            found = []
            for seed in args.seeds:
                print(f"{architecture}, {WORDS[recipe]} recipe, seed {seed}", file=sys.stderr, flush=True)
                found.append(measure(args.out / f"{architecture}-{recipe}-{seed}", args.steps))
            entropy, tokens = found[0]["entropy_bits_per_byte"], int(found[0]["tokens"])
            columns = {key: [one[key] for one in found] for key in ("training_loss", "held_out_loss", "bits_per_byte")}
            cells[f"{architecture}/{recipe}"] = columns
            table.append(
                f"| {WORDS[architecture]} | {WORDS[recipe]} | {spread(columns['training_loss'])} "
                f"| {spread(columns['held_out_loss'])} | {spread(columns['bits_per_byte'])} |"
            )
    print("| architecture | recipe | training loss | held-out loss | held-out bits per byte |")
    print("|---|---|---|---|---|")
    print("\n".join(table))
    print(f"\n{tokens:,} tokens a run, seeds {args.seeds}; the source's own entropy is {entropy:.4f} bits per byte\n")
    outcome = {"benchmark": "recipes", "tokens": tokens, "seeds": args.seeds, "machine": platform.processor() or None}
    print(json.dumps({**outcome, "entropy_bits_per_byte": entropy, "cells": cells}))


if __name__ == "__main__":
    main()
