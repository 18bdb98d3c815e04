"""A run small enough to be made many times over."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from smolforge.metrics_log import read_metrics
from smolforge.run import Run
from smolforge.training.setup import TrainRequest
from smolforge.training.train import run_training

TINY = {
    "model": {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10000.0,
    },
    "tokenizer": {"train": {"vocab_size": 320, "documents": 40}},
    "data": {"sequence_length": 32, "lanes": 4, "holdout": 0.05, "workers": 1},
    "optimizer": {"name": "adamw", "lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.01},
    "schedule": {"name": "wsd"},
    "training": {"tokens_per_step": 256, "steps": 20, "precision": "fp32", "threads": 1},
    "checkpoint": {"every": 5},
    "evaluation": {"every": 10, "tokens": 2000},
    "samples": {"every": 10, "max_tokens": 8, "prompts": ["Once upon a time"]},
    "logging": {"every": 1, "trackers": []},
}  # fmt: skip


def tiny_file(directory: Path) -> str:
    """The tiny configuration as a YAML file."""
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Trains the tiny run into a directory of the given name; sections as keywords change its configuration."""
    base = tiny_file(tmp_path)

    def make(name: str = "run", *, request: dict[str, Any] | None = None, **changes: Any) -> Run:
        run, shutdown = run_training(TrainRequest(base, out=tmp_path / name, layers=changes, **(request or {})))
        assert shutdown.exit_code == 0
        return run

    return make


def steps_of(run: Run) -> list[tuple[int, float, str]]:
    """(step, loss, data_digest) of all training rows."""
    return [(r["step"], r["loss"], r["data_digest"]) for r in read_metrics(run) if "loss" in r]


def validations_of(run: Run) -> list[tuple[int, dict[str, float]]]:
    """(step, scores) of all validation rows."""
    return [(r["step"], r["validation"]) for r in read_metrics(run) if "validation" in r]


def weights_of(run: Run) -> bytes:
    """The bytes of the newest checkpoint's weights."""
    return (run.checkpoints_path / "last" / "model.safetensors").read_bytes()


def undo_after(run: Run, step: int) -> None:
    """Take away all checkpoints but that of `step`, as if the run had been killed soon after it."""
    for directory in run.checkpoints_path.iterdir():
        if directory.is_symlink():
            directory.unlink()
        elif directory.name != f"step-{step:08d}":
            shutil.rmtree(directory)
