"""How the held-out loss falls with the size of the model and the tokens it reads: the fit behind `smolforge plan`.

    python benchmarks/learning/scaling.py TEXTS... --out DIR [--tokens 250k,500k,1M,2M] [--seeds 3] [--jobs 2]

Three models, deep and narrow and with a tied embedding, trained by the default recipe. The fit is that of Hoffmann et
al. 2022 (arXiv:2203.15556), bits per byte = E + A / N^alpha + B / D^beta with N without embeddings. Runs of minutes say
little of long ones, so SmolLM2-135M-Instruct is fitted with them. They do not determine alpha, which is that of the
paper. TEXTS and the directories of the runs are those of recipes.py, so a killed benchmark goes on where it was. Beside
each run stands what the fit without it predicts. The last line is one JSON object.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from recipes import MODEL, configuration, parser, train, train_tokenizer
from rules import SMALL

from smolforge.config import RunConfig
from smolforge.config.values import parse_count
from smolforge.training.recipe import count_body
from smolforge.training.scaling_law import Fit

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 1},
    "small": SMALL,
    "large": {},
}  # fmt: skip
ALPHA = 0.34
# SmolLM2-135M: N, its tokens, and what `smolforge eval smollm2 --data TEXT --tokens 6k` says of the tuned model: 1.2662
# of classic books, 0.7905 of TinyStories and 0.9970 of WikiText-2, weighted by the size of the texts.
PUBLISHED = (106_200_000, 2e12, 1.18)
MOST = {"large": 1_000_000}  # tokens, of which a run takes five minutes


def fit(points: list[tuple[float, float, float]]) -> Fit:
    """The least squares of relative errors over (N, D, bits per byte)."""
    n, d, bits = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    found = []
    for beta in np.arange(0.1, 0.5, 0.01):
        terms = np.stack([np.ones_like(n), n**-ALPHA, d**-beta], 1) / bits[:, None]
        constants = np.linalg.lstsq(terms, np.ones_like(bits), rcond=None)[0]
        found.append((float(((terms @ constants - 1) ** 2).sum()), float(beta), *map(float, constants)))
    return Fit(ALPHA, *min(found)[1:])


def main() -> None:
    """Train all runs, the shortest first, and print the table and the fit."""
    args = parser(__doc__, tokens="250k,500k,1M,2M").parse_args()
    train_tokenizer(args)
    runs = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for tokens in sorted(map(parse_count, args.tokens.split(","))):
            for shape, changes in SHAPES.items():
                for seed in range(args.seeds if tokens <= MOST.get(shape, tokens) else 0):
                    config = configuration("muon", seed, args, tokens) | {"model": MODEL | changes}
                    body = count_body(RunConfig.model_validate(config))
                    runs.append((body, tokens, pool.submit(train, f"{shape}-{tokens}-{seed}", config, args.out)))
        points = [(body, tokens, run.result()["bits_per_byte"]) for body, tokens, run in runs]
    print(report(points))


def report(points: list[tuple[float, float, float]]) -> str:
    """Markdown and JSON: each run beside what the fit of all other rows says of it, then the fit of all."""
    lines = ["| N | tokens | bits per byte | the fit without the row | off |", "|---|---|---|---|---|"]
    misses = []
    for row, (body, tokens, bits) in enumerate(points):
        said = fit([*points[:row], *points[row + 1 :], PUBLISHED]).bits(body, tokens)
        misses.append(said / bits - 1)
        lines.append(f"| {body:,} | {tokens:,} | {bits:.4f} | {said:.4f} | {misses[-1]:+.1%} |")
    found = {"fit": vars(fit([*points, PUBLISHED])), "largest_miss": max(map(abs, misses)), "points": points}
    return "\n".join([*lines, json.dumps(found)])


if __name__ == "__main__":
    main()
