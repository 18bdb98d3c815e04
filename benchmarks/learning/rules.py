"""Whether the rules of the recipe hold: two sizes, three budgets, and a sweep around what the program chooses.

    python benchmarks/learning/rules.py TEXTS... --out DIR [--tokens 125k,250k,500k] [--seeds 3] [--jobs 2]

Each run changes one value of the default recipe: the peak of the rate or the batch, halved or doubled. The weight decay
follows both by its rule, as it does for a user who sets them. Two models, deep and narrow and with a tied embedding: 8
layers of width 128 and 12 of width 192. TEXTS and the directories of the runs are those of recipes.py, so a killed
benchmark goes on where it was. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from recipes import MODEL, configuration, mean_and_spread, parser, train, train_tokenizer

from smolforge.config import RunConfig
from smolforge.config.values import parse_count
from smolforge.training.recipe import resolve_batch, resolve_recipe

SMALL = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 8, "num_attention_heads": 2}
MODELS = {"small": MODEL | SMALL, "large": MODEL}
WINDOW = 128
# What each run multiplies.
CHANGES: dict[str, dict[str, float]] = {
    "default": {}, "half peak": {"peak": 0.5}, "double peak": {"peak": 2},
    "half batch": {"batch": 0.5}, "double batch": {"batch": 2},
}  # fmt: skip


def planned(config: dict[str, Any]) -> RunConfig:
    """`config` with the values that the program would choose for it."""
    return resolve_recipe(resolve_batch(RunConfig.model_validate(config), torch.device("cpu")))[0]


def changed(model: str, tokens: int, change: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The configuration of one run, whose windows are short so that a small batch holds several."""
    config = configuration("muon", seed, args, tokens)
    config["model"] = MODELS[model]
    config["data"]["sequence_length"] = WINDOW
    default, factors = planned(config), CHANGES[change]
    if "peak" in factors:
        config["optimizer"] = {"lr": default.optimizer.lr * factors["peak"], "groups": default.optimizer.groups}
    if "batch" in factors:
        config["training"]["tokens_per_step"] = round(default.tokens_per_step * factors["batch"] / WINDOW) * WINDOW
    return config


def table(found: dict[tuple[str, int, str], list[float]]) -> str:
    """Markdown: a row for each size and budget, and how far the default's mean is above the best of its row."""
    lines = [f"| model | tokens | {' | '.join(CHANGES)} | default above the best |", f"|{'---|' * (len(CHANGES) + 3)}"]
    for model, tokens in dict.fromkeys((model, tokens) for model, tokens, _ in found):
        row = [found[model, tokens, change] for change in CHANGES]
        means, cells = [statistics.mean(values) for values in row], map(mean_and_spread, row)
        lines.append(f"| {model} | {tokens:,} | {' | '.join(cells)} | {means[0] / min(means) - 1:.2%} |")
    return "\n".join(lines)


def main() -> None:
    """Train all runs, the shortest first, and print the table."""
    args = parser(__doc__, tokens="125k,250k,500k").parse_args()
    train_tokenizer(args)
    found: dict[tuple[str, int, str], list[float]] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [
            ((model, tokens, change), pool.submit(train, name, changed(model, tokens, change, seed, args), args.out))
            for seed in range(args.seeds)
            for tokens in map(parse_count, args.tokens.split(","))
            for model in MODELS
            for change in CHANGES
            for name in [f"{model}-{tokens}-{change}-{seed}"]
        ]
        for case, run in runs:
            found.setdefault(case, []).append(run.result()["bits_per_byte"])
    print(table(found))
    print(json.dumps({" ".join(map(str, case)): values for case, values in found.items()}))


if __name__ == "__main__":
    main()
