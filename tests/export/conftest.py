"""A run with a checkpoint that has training state and a card, shared by the tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny import TINY

from smolforge.training.setup import TrainRequest
from smolforge.training.train import run_training


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    (place / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    layers = {"training": {"steps": 3}, "samples": {"every": 100}, "evaluation": {"every": 100}}
    return run_training(TrainRequest(str(place / "tiny.yaml"), out=place / "cat", layers=layers))[0].path
