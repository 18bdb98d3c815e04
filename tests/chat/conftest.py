"""What the tests of tuning share: a place for a module's files, a base model and conversations in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_files import conversations, rows_of, write
from chat_runs import make_base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])


@pytest.fixture(scope="module")
def base(place: Path) -> Path:
    return make_base(place / "base")


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    return write(place / "chat.jsonl", rows_of(conversations(60)))
