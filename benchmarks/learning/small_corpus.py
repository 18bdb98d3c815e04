"""A small text that is read many times: does the mode for it learn more, and does the held-out curve turn up?

    python benchmarks/learning/small_corpus.py TEXT --out DIR [--megabytes 0.9] [--epochs 10] [--seeds 3] [--jobs 2]

TEXT is a .jsonl of whole books. Pieces of 6,000 characters, drawn from all of them, are the documents, of which 30% are
held out. `before` is SmolLM2's recipe as the presets had it, `off` the recipe that follows from size and tokens, `mode`
the same with what is decided for a text that is read many times. A step of `mode` and its validations take longer, so
`mode@0.7` reads the text less often, for about equal time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recipes import MODEL, RECIPES, configuration, mean_and_spread, parser, train, train_tokenizer
from rules import SMALL

from smolforge.config import build_config
from smolforge.training import small_corpus

PIECE = 6000  # characters
ARMS = ("mode", "before", "off", "mode@0.7")


def cut(source: Path, size: float, out: Path) -> Path:
    """Pieces of the books in `source`, in a fixed random order, until they have `size` bytes, as a .jsonl in `out`."""
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    pieces = [text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)]
    random.Random(0).shuffle(pieces)
    place, written = out / "pieces.jsonl", 0
    with place.open("w", encoding="utf-8") as file:
        for piece in pieces:
            if written > size:
                break
            file.write(json.dumps({"text": piece}) + "\n")
            written += len(piece.encode())
    return place


def trained(arm: str, seed: int, pieces: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run. `off` has what `mode` derived, without dropout and with the decay of unrepeated text."""
    name, _, share = arm.partition("@")
    config = configuration("muon", seed, args, 1_000_000) | (RECIPES["smollm2"][1] if name == "before" else {})
    epochs = args.epochs * float(share or 1)
    given = {"epochs": epochs, "seed": seed, "compile": "off", "threads": args.threads}
    config["training"] = given | ({"dropout": 0.0, "ema": 0.0} if name != "mode" else {})
    if name == "before":
        config["training"] |= RECIPES["smollm2"][1]["training"]
    if name == "off":
        derived = build_config(str(args.out / f"corpus-mode-{seed}" / "config.yaml"))
        config["optimizer"] = {"weight_decay": derived.optimizer.weight_decay / small_corpus.DECAY}
    config["model"] = MODEL | SMALL
    config["data"] |= {"sources": {str(pieces): 1}, "sequence_length": 256, "holdout": 0.3}
    return train(f"corpus-{arm}-{seed}", config, args.out)


def main() -> None:
    """Train all runs and print the table."""
    asked = parser(__doc__)
    asked.add_argument("--megabytes", type=float, default=0.9)
    asked.add_argument("--epochs", type=float, default=10)
    args = asked.parse_args()
    train_tokenizer(args)
    pieces = cut(Path(args.texts[0]), args.megabytes * 1e6, args.out)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            (arm, seed): pool.submit(trained, arm, seed, pieces, args) for arm in ARMS for seed in range(args.seeds)
        }
        found = {arm: [runs[arm, seed].result() for seed in range(args.seeds)] for arm in ARMS}
    print(
        "| recipe | weights at the end | their lowest | their average at the end | CPU seconds |\n|---|---|---|---|---|"
    )
    for name, each in found.items():
        curves = [[bits for _, bits in run["curve"]] for run in each]
        averages = [run["averages"][-1][1] for run in each if run["averages"]]
        cells = [mean_and_spread([curve[-1] for curve in curves]), mean_and_spread([min(curve) for curve in curves])]
        cells.append(mean_and_spread(averages) if averages else "")
        print(f"| {name} | {' | '.join(cells)} | {statistics.mean(run['cpu_seconds'] for run in each):,.0f} |")
    print(
        json.dumps(
            {name: [{key: run[key] for key in ("curve", "averages")} for run in each] for name, each in found.items()}
        )
    )


if __name__ == "__main__":
    main()
