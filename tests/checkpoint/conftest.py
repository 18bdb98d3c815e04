"""A tiny model with its tokenizer, shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

from smolforge.checkpoint.commit import commit
from smolforge.checkpoint.format import write_model
from smolforge.checkpoint.state import save_state
from smolforge.config import ModelConfig
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tiny:
    config: ModelConfig
    module: nn.Module
    tokenizer: Tokenizer

    def write(self, directory: Path) -> None:
        """A whole model directory with training state, as training writes it."""
        write_model(directory, self.config, self.module.state_dict(), self.tokenizer, card="# Tiny\n")
        save_state(directory / "training", {"step": 3, "moments": {0: self.module.state_dict()["model.norm.weight"]}})


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    config = ModelConfig(
        vocab_size=290, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    tokenizer = Tokenizer.train(["the cat sat on the mat and saw the other cat " * 20], 290)
    return Tiny(config, build_model(config, seed=7), tokenizer)


@pytest.fixture
def checkpoints(tiny: Tiny, tmp_path: Path) -> Path:
    """RUN/checkpoints with whole checkpoints of the steps 1, 2 and 3."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        commit(folder, step, tiny.write)
    return folder


@pytest.fixture
def model_dir(tiny: Tiny, tmp_path: Path) -> Path:
    """A plain model directory without a manifest."""
    tiny.write(tmp_path / "model")
    return tmp_path / "model"


Write = Callable[[Path], None]
