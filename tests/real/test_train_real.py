"""Training on genuine text with the genuine tokenizer."""

import math
from pathlib import Path

import pytest

from smolforge import cli
from smolforge.files import read_json_lines
from smolforge.metrics_log import read_metrics
from smolforge.run import Run


def sources(real_data: Path) -> list[str]:
    return [str(p) for p in sorted((real_data / "text").iterdir()) if p.suffix in (".txt", ".jsonl")]


def train(real_data: Path, out: Path, *more: str) -> list[dict]:
    words = ["train", "smollm2-135m", "--data", *sources(real_data), "--out", str(out), *more]
    words += ["--set", f"tokenizer={real_data / 'tokenizer' / 'smollm2-135m'}"]
    assert cli.run(words) == 0
    return [row for row in read_metrics(Run(out)) if "loss" in row]


def test_a_narrow_smollm2_learns_from_real_text(real_data: Path, tmp_path: Path) -> None:
    narrow = ["model.num_hidden_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.head_dim=16",
              "model.num_key_value_heads=2", "model.intermediate_size=128", "data.sequence_length=64",
              "training.tokens_per_step=512", "evaluation.tokens=2000", "training.compile=off", "samples.max_tokens=5",
              "logging.every=1", "training.precision=fp32"]  # fmt: skip
    options = [word for key in narrow for word in ("--set", key)]
    rows = train(real_data, tmp_path / "run", "--steps", "12", *options)
    # Logits of new weights are normal with variance 1, which adds a half to the logarithm of the vocabulary.
    assert abs(rows[0]["loss"] - (math.log(49152) + 0.5)) < 0.3
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    scores = [row["validation"] for row in read_metrics(Run(tmp_path / "run")) if "validation" in row]
    assert 1 < scores[-1]["bits_per_byte"] < scores[0]["bits_per_byte"]


@pytest.mark.slow
def test_the_full_135m_trains_stops_resumes_and_writes(real_data: Path, tmp_path: Path) -> None:
    # By its rule the rate would be 0.0002 for a run of 8,192 tokens.
    small = ["data.sequence_length=256", "training.tokens_per_step=1024", "evaluation.tokens=2048",
             "logging.every=1", "samples.max_tokens=10", "optimizer.lr=0.003"]  # fmt: skip
    options = [word for key in small for word in ("--set", key)]
    train(real_data, tmp_path / "run", "--steps", "8", "--set", "checkpoint.every=4", *options)
    rows = train(real_data, tmp_path / "run", "--steps", "+4")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert 10.8 < rows[0]["loss"] < 11.8 and rows[-1]["loss"] < rows[0]["loss"] - 1
    assert {row["step"] for row in list(read_json_lines(Run(tmp_path / "run").samples_path))} >= {8, 12}
