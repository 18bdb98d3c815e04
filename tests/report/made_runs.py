"""Runs that never were: the files of a run directory, written without training anything."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from smolforge.config import THREE_PROMPTS, build_config

STAGES = (
    ", the the of and a , was . to the in",
    ", there was a little little girl and the girl was the day. She was a big tree and the tree.",
    ", there was a curious rabbit named Pip who lived beside the old mill. Pip liked to count the stars.",
    ", there was a curious rabbit named Pip who lived beside the old mill. Every evening Pip climbed the hill to "
    "count the stars, and every evening one star was missing.\n\n“Where do you go?” asked Pip. The smallest star "
    "blinked. “I come down to drink,” it said, “and tonight I should like some company.”",
)


def make_run(
    path: Path,
    *,
    rows: int = 640,
    total: int | None = None,
    seed: int = 0,
    events: bool = True,
    entropy: float | None = 0.905,
    lr: float = 3e-3,
    overrides: list[str] | None = None,
) -> Path:
    """A pocket-sized run of `rows` logged steps out of `total`."""
    generator = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    total = total or rows
    model = "vocab_size=4096 hidden_size=192 num_hidden_layers=6 num_attention_heads=6 intermediate_size=512"
    sizes = [f"model.{size}" for size in f"{model} num_key_value_heads=2 max_position_embeddings=512".split()]
    other = [f"training.steps={total}", "data.sequence_length=256", f"optimizer.lr={lr}", "logging.every=1"]
    config = build_config(None, [*sizes, *other, *(overrides or [])])
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    steps = np.arange(1, rows + 1)
    share = steps / total
    loss = 1.52 + 6.8 * np.exp(-28 * share) + 0.75 * np.exp(-4 * share) - 0.12 * np.clip((share - 0.8) / 0.2, 0, 1)
    loss += generator.normal(0, 0.055, rows)
    norm = np.exp(generator.normal(-0.9, 0.25, rows)) + 2.5 * np.exp(-60 * share)
    if rows > 400:
        norm[rows // 3] = 9.0
    rate = lr * np.minimum(1, np.minimum(steps / (0.02 * total + 1), (total - steps + 1) / (0.2 * total + 1)))
    speed = 31_000 * (1 + generator.normal(0, 0.03, rows)) * np.where(generator.random(rows) < 0.02, 0.6, 1)
    tokens = steps * 4096
    time = 1_760_000_000 + np.cumsum(4096 / speed)
    time[rows // 2 :] += 7200  # the run lay still for two hours
    waits = np.abs(generator.normal(0, 0.004, rows)) + (generator.random(rows) < 0.01) * 0.05
    memory = np.minimum(6.1e8 + 2e5 * steps, 7.4e8)
    validate = {max(1, round(rows * k / 12)) for k in range(1, 13)}
    with (path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            if events and i == rows // 2:
                write(file, {"step": i, "event": "resume", "time": time[i] - 3, "checkpoint": f"step-{i:08d}"})
            if events and rows > 400 and i == rows // 3:
                write(file, {"step": i, "event": "skip", "time": time[i], "reason": "not finite", "batch": i})
            write(
                file,
                {"step": int(steps[i]), "tokens": int(tokens[i]), "loss": float(loss[i]), "lr": float(rate[i]),
                 "grad_norm": float(norm[i]), "tokens_per_second": float(speed[i]), "memory_bytes": int(memory[i]),
                 "data_seconds": float(waits[i]), "data_digest": "00ff", "time": float(time[i])},
            )  # fmt: skip
            if steps[i] in validate:
                held = float(np.mean(loss[max(0, i - 8) : i + 1])) + 0.03
                row: dict[str, Any] = {
                    "step": int(steps[i]), "tokens": int(tokens[i]), "time": float(time[i]),
                    "validation": {"loss": held, "perplexity": float(np.exp(held)), "bits_per_byte": held / 1.386},
                }  # fmt: skip
                write(file, row | ({"entropy_bits_per_byte": entropy} if entropy else {}))
    rng = random.Random(seed)
    with (path / "samples.jsonl").open("w", encoding="utf-8") as file:
        for step in sorted(validate):
            for prompt in THREE_PROMPTS:
                text = STAGES[min(3, int(4 * step / total))] if rows else ""
                write(file, {"step": int(step), "prompt": prompt, "text": text[: rng.randint(250, 600)],
                             "finish_reason": rng.choice(["length", "stop"]), "seed": 0})  # fmt: skip
    (path / "environment.json").write_text(
        json.dumps(
            {"python": "3.11.7", "torch": "2.13.0+cpu", "smolforge": "0.1.0", "platform": "Linux x86_64",
             "device": "cpu", "threads": 2, "command": "smolforge train pocket --out runs/tale",
             "started": "2026-10-17 23:10:04",
             "decisions": ["precision fp32: this CPU has no bf16 matrix units",
                           "micro-batch 16 sequences: 16 x 256 tokens fit into 6.0 GiB",
                           "torch.compile off: the run is shorter than compiling would pay"]}
        ),
        encoding="utf-8",
    )  # fmt: skip
    return path


def write(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
