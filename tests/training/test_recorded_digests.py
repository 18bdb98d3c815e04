"""The stream of today is the stream of the first release: digests recorded once, for each kind of source.

A run that was begun with an earlier version must read the same batches. `python tests/training/test_recorded_digests.py`
records the file anew; a change of it breaks every existing run and must be meant.
"""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECORDED = Path(__file__).with_name("recorded_digests.json")
STEPS = 12
CONFIG = {
    "model": {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10000.0,
    },
    "tokenizer": {"train": {"vocab_size": 320, "documents": 40}},
    "data": {"sequence_length": 32, "lanes": 4, "holdout": 0.05, "workers": 1},
    "optimizer": {"name": "adamw", "lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.01},
    "schedule": {"name": "wsd"},
    "training": {"tokens_per_step": 256, "precision": "fp32", "threads": 1},
    "evaluation": {"every": STEPS, "tokens": 1000},
    "samples": {"prompts": []},
    "logging": {"every": 1, "trackers": []},
}  # fmt: skip
SOURCES = ("tales", "texts", "lines", "shards", "mixed", "masked")
WORDS = [
    "the",
    "river",
    "a",
    "lamp",
    "stone",
    "bird",
    "walks",
    "sings",
    "over",
    "under",
    "green",
    "seven",
    "quiet",
    "morning,",
    "and",
    "then;",
    "it",
    "was.",
    "é",
    "ß",
    "山",
]


def documents(count: int, seed: int) -> list[str]:
    """Texts of a linear congruential generator: the same on every machine and in every version of Python."""
    state, texts = seed, []
    for _ in range(count):
        words = []
        for _ in range(10 + state // 7 % 60):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            words.append(WORDS[(state >> 33) % len(WORDS)])
        texts.append(" ".join(words))
    return texts


def make_sources(place: Path) -> None:
    """One source of each kind under `place`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (place / "texts").mkdir()
    for i, text in enumerate(documents(90, 1)):
        (place / "texts" / f"{i:03}.txt").write_text(text + "\n\n" + text[::-1], encoding="utf-8")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(300, 2))
    (place / "lines.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(place / "packed.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (place / "shards").mkdir()
    for i in range(3):
        table = pa.table({"id": list(range(120)), "text": documents(120, 10 + i)})
        pq.write_table(table, place / "shards" / f"{i}.parquet", row_group_size=17, compression="zstd")


def arguments(source: str, place: Path) -> list[str]:
    """The options of `smolforge train` that name a source."""
    return {
        "tales": ["--data", "tales"],
        "texts": ["--data", "texts"],
        "lines": ["--data", "lines.jsonl"],
        "shards": ["--data", "shards"],
        "mixed": ["--data", "packed.jsonl.gz=0.7", "shards=0.3", "--set", "data.seed=7"],
        "masked": ["--data", "lines.jsonl", "--set", "data.mask_documents=true"],
    }[source]


def train(source: str, place: Path) -> list[dict]:
    """Rows of the steps of one run on a source, trained by the command line."""
    (place / "base.yaml").write_text(yaml.safe_dump(CONFIG))
    out = place / f"run-{source}"
    command = [sys.executable, "-m", "smolforge", "train", "base.yaml", "--out", str(out), "--steps", str(STEPS)]
    done = subprocess.run([*command, *arguments(source, place)], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{"data_digest": row["data_digest"], "loss": round(row["loss"], 6)} for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("recorded")
    make_sources(directory)
    return directory


@pytest.mark.parametrize("source", SOURCES)
def test_digests_are_the_recorded_ones(source: str, place: Path) -> None:
    recorded, found = json.loads(RECORDED.read_text())[source], train(source, place)
    assert [row["data_digest"] for row in found] == [row["data_digest"] for row in recorded]
    # The order of sums differs from one processor to another; the curve does not.
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in recorded], rel=2e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        make_sources(Path(scratch))
        rows = {source: train(source, Path(scratch)) for source in SOURCES}
    RECORDED.write_text(json.dumps(rows, indent=1) + "\n")
