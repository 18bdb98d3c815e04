"""What a token teaches by four recipes: one small Llama on real text, held-out bits per byte, several seeds.

    python benchmarks/learning/recipes.py TEXTS... --out DIR [--tokens 2M] [--seeds 3] [--jobs 2] [--only NAME ...]
    python benchmarks/learning/recipes.py TEXTS... --out DIR --preset smollm2-135m --tokenizer DIR --jobs 1

TEXTS are files that `smolforge train` reads; the figures of docs/recipes.md are of TinyStories, classic books and
WikiText-2. The model is deep and narrow and ties its embedding, as SmolLM2 does: 12 layers of width 192, with a
tokenizer trained on the same texts; `--preset` trains a preset's model instead, which takes a GPU. `muon@0.5` is the
default recipe planned for half of the tokens, since a rate that falls to zero makes the middle of a longer run worse
than the end of a shorter one. Each run is an ordinary run directory in DIR: what a killed benchmark has trained is not
trained again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smolforge.config import build_config
from smolforge.config.values import parse_count

MODEL = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 1024, "rope_theta": 10000.0, "vocab_size": 4096,
}  # fmt: skip
# Share of the tokens, and the settings that are not the default's.
RECIPES: dict[str, tuple[float, dict[str, Any]]] = {
    "muon": (1.0, {}),
    "muon@0.65": (0.65, {}),
    "muon@0.5": (0.5, {}),
    "muon@0.2": (0.2, {}),
    "adamw": (1.0, {"optimizer": {"name": "adamw"}}),
    # SmolLM2's own pretraining, as the presets had it: 2 million steps, of which the run has some hundred.
    "smollm2": (1.0, {
        "optimizer": {"name": "adamw", "lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.01},
        "schedule": {"name": "wsd", "warmup": 0.1, "decay": 0.2},
        "training": {"tokens_per_step": 8192},
    }),
    # The notebook that smolforge began as: OneCycleLR, batches of 4,096 tokens.
    "seed": (1.0, {
        "optimizer": {"name": "adamw", "lr": 3e-4, "betas": [0.9, 0.999], "weight_decay": 1e-4},
        "schedule": {"name": "onecycle", "start": 0.04, "warmup": 0.2, "floor": 0.01, "anneal": "linear"},
        "training": {"tokens_per_step": 4096},
    }),
}  # fmt: skip


def configuration(recipe: str, seed: int, args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """The configuration of one run of the recipe's share of `tokens`."""
    share, settings = RECIPES[recipe]
    training = {"tokens": int(share * tokens), "seed": seed, "compile": "off", "threads": args.threads}
    never = {"every": 1_000_000}
    shape, length, tokenizer = MODEL, 512, str(args.out / "tokenizer" / "tokenizer")
    if args.preset:
        preset = build_config(args.preset)
        shape, length, tokenizer = preset.model.model_dump(), preset.data.sequence_length, args.tokenizer
        training |= {"compile": args.compile, "threads": None}
        if recipe == "smollm2":
            settings = settings | {"training": {"tokens_per_step": 524_288}}  # as the preset had it
    return {
        "model": shape,
        "tokenizer": tokenizer,
        "data": {
            "sources": {source: Path(source).stat().st_size for source in args.texts},
            "sequence_length": length, "lanes": 8, "seed": seed, "mask_documents": True,
        },
        **settings,
        "training": {**training, **settings.get("training", {})},
        "evaluation": {"tokens": 65_536}, "samples": never, "checkpoint": {**never, "keep": 1, "best": False},
        "logging": {"every": 10, "trackers": []},
    }  # fmt: skip


def train(name: str, config: dict[str, Any], out: Path, *more: str) -> dict[str, Any]:
    """Train one run to its end, unless it has come there; its last validation and its CPU seconds."""
    log, done = out / f"{name}.log", out / f"{name}.json"
    if not done.is_file():
        path = out / f"{name}.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        command = [sys.executable, "-m", "smolforge", "train", str(path), "--out", str(out / name), *more]
        threads = config["training"]["threads"]
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        with log.open("w") as said:
            started = time.time()
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{name} failed:\n{log.read_text()[-2000:]}")
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        curve = [[row["tokens"], row["validation"]["bits_per_byte"]] for row in rows if "validation" in row]
        averages = [[row["tokens"], row["average"]["bits_per_byte"]] for row in rows if "average" in row]
        figures = {
            "bits_per_byte": curve[-1][1],
            "curve": curve,
            "averages": averages,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }
        done.write_text(json.dumps(figures | {"seconds": time.time() - started}))
    return json.loads(done.read_text())


def mean_and_spread(values: list[float]) -> str:
    """`2.1175 ± 0.0189`: mean and standard deviation, where there are several."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def table(found: dict[str, list[dict[str, Any]]], tokens: int) -> str:
    """Markdown: a row for each recipe that has a run."""
    lines = ["| recipe | tokens | held-out bits per byte | CPU seconds |", "|---|---|---|---|"]
    for recipe, runs in found.items():
        values = [run["bits_per_byte"] for run in runs]
        cpu = statistics.mean(run["cpu_seconds"] for run in runs)
        read = int(RECIPES[recipe][0] * tokens)
        lines.append(f"| {recipe} | {read:,} | {mean_and_spread(values)} ({len(values)}) | {cpu:,.0f} |")
    return "\n".join(lines)


def parser(description: str | None, tokens: str | None = None) -> argparse.ArgumentParser:
    """What the benchmarks of learning ask; `tokens` is the default, where a run has so many."""
    asked = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("texts", nargs="+", help="files of text, each weighted by its size")
    asked.add_argument("--out", type=Path, required=True, help="directory of the runs")
    if tokens:
        asked.add_argument("--tokens", default=tokens, help=f"of a run: {tokens}")
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--jobs", type=int, default=2, help="runs at a time")
    asked.add_argument("--threads", type=int, default=1, help="threads of each")
    asked.set_defaults(preset=None)
    return asked


def train_tokenizer(args: argparse.Namespace) -> None:
    """Train the tokenizer of all runs, and with it one step."""
    args.out.mkdir(parents=True, exist_ok=True)
    first = configuration("adamw", 0, args, 1_000_000)
    first["tokenizer"] = {"train": {"vocab_size": MODEL["vocab_size"], "documents": 4000}}
    train("tokenizer", first, args.out, "--steps", "1")


def main() -> None:
    """Train all runs and print the table."""
    asked = parser(__doc__, tokens="2M")
    asked.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    asked.add_argument("--preset", help="train its model, with --tokenizer, instead of the small one")
    asked.add_argument("--tokenizer", help="directory of the preset's tokenizer")
    asked.add_argument("--compile", default="auto", help="of the preset's runs: auto, on or off")
    args = asked.parse_args()
    if args.preset:
        args.out.mkdir(parents=True, exist_ok=True)
    else:
        train_tokenizer(args)
    tokens = parse_count(args.tokens)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            (recipe, seed): pool.submit(train, f"{recipe}-{seed}", configuration(recipe, seed, args, tokens), args.out)
            for seed in range(args.seeds)
            for recipe in args.only
        }
        found = {recipe: [runs[recipe, seed].result() for seed in range(args.seeds)] for recipe in args.only}
    print(table(found, tokens))
    ends = {recipe: [run["bits_per_byte"] for run in each] for recipe, each in found.items()}
    print(json.dumps({"tokens": tokens, "bits_per_byte": ends}))


if __name__ == "__main__":
    main()
