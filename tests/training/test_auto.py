"""Size and length of a run without a preset: what is chosen, what is told, and that it is chosen once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolforge.config import build_config
from smolforge.data import index as indexing
from smolforge.errors import BadInput
from smolforge.formatting import count
from smolforge.training import auto
from smolforge.training.dry_run import rehearse
from smolforge.training.setup import TrainRequest

Chooses = Callable[..., TrainRequest]


@pytest.fixture
def choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chooses:
    """Chooses for a text of so many tokens on a machine of so many tokens per second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text("text")

    def one(tokens: int = 10**9, speed: float = 10_000.0, minutes: float | None = None, **request: Any) -> TrainRequest:
        monkeypatch.setattr(auto, "measure_speed", lambda *_, **__: {"tokens_per_second": speed})
        monkeypatch.setattr(auto, "_text_of", lambda config: (4 * tokens, tokens, None))
        return auto.choose(TrainRequest(**{"layers": {"data": {"sources": {"texts": 1.0}}}, **request}), minutes)

    return one


def test_the_size_follows_from_text_and_minutes(choose: Chooses, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="smolforge")
    chosen = [choose(minutes=minutes) for minutes in (5, 120, 60 * 12, 60 * 24 * 7)]
    sizes = [auto.LADDER.index(request.base or "") for request in chosen]
    assert sizes == [0, 0, 1, 2]
    assert choose(minutes=60 * 24, speed=10**6).base == "llama-83m"
    parameters = count(5_048_576)
    assert (
        f"size: llama-5m, {parameters} parameters (the largest with 10 tokens for each parameter in 720 min)"
        in caplog.text
    )
    # The same time with less text is not spent on a larger model.
    assert choose(tokens=10**6, minutes=60 * 24 * 7).base == "pocket"
    assert all(request.out == Path("runs") / "texts" for request in chosen)


def test_the_length_follows_from_minutes_or_from_the_text(choose: Chooses, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="smolforge")
    by_time = choose(minutes=5)
    assert by_time.layers["training"]["steps"] == int(10_000 * 5 * 60 * 0.8 / 1024)
    assert "(5 min at about 10,000 tokens/s here, of a measurement)" in caplog.text
    assert choose().layers == by_time.layers, "five minutes unless given"
    by_text = choose(tokens=100_000, minutes=60)
    assert by_text.layers["training"]["steps"] == 10 * 100_000 // 1024
    assert "are read 10 times; more would learn it by heart" in caplog.text
    small = choose(tokens=2_000, minutes=60)
    assert small.layers["training"]["steps"] == auto.FEWEST_STEPS and "a small text needs so many" in caplog.text
    assert "`--init smollm2` learns more" in caplog.text
    config = build_config(small.base, list(small.overrides), **small.layers)
    assert config.total_steps == 300 and config.evaluation.every == config.checkpoint.every == 60


def test_what_was_named_is_kept(choose: Chooses, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"data": {"sources": {"texts": 1.0}}}
    for request in (
        {"base": "smollm2-135m"},
        {"overrides": ["training.steps=7"]},
        {"overrides": ["model.hidden_size=96"]},
        {"layers": {**data, "training": {"tokens": 10**6}}},
        {"base": "smollm2-135m", "layers": {**data, "init": "smollm2"}},
        {"layers": {}},
        {"more_steps": 5},
        {"must_resume": True},
    ):
        same = choose(**request)
        assert (same.base, same.overrides) == (request.get("base"), request.get("overrides", ())), request
        assert same.layers == request.get("layers", data), request
    trained_on = choose(layers={**data, "init": "smollm2"})
    assert trained_on.base == "continue" and trained_on.layers == {**data, "init": "smollm2"}
    optimizer = build_config("continue").optimizer  # the pocket preset has muon and 0.012
    assert (optimizer.name, optimizer.lr) == ("adamw", 1e-4)
    named = choose(base="llama-13m", minutes=30)
    assert named.base == "llama-13m" and named.out is None and named.layers["training"]["steps"] > 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose().base is None
    with pytest.raises(BadInput, match="--minutes: is for one process"):
        choose(minutes=5)


def test_minutes_that_mean_nothing_are_refused(choose: Chooses) -> None:
    with pytest.raises(BadInput, match="must be above 0"):
        choose(minutes=0)
    with pytest.raises(BadInput, match="how fast another model trains here"):
        choose(minutes=5, layers={"data": {"sources": {"texts": 1.0}}, "init": "smollm2"})


def test_a_run_is_chosen_once(choose: Chooses, monkeypatch: pytest.MonkeyPatch) -> None:
    request = choose()
    assert request.out is not None
    request.out.mkdir(parents=True)
    (request.out / "config.yaml").write_text("preset: pocket\n")
    again = choose()
    assert again.out == request.out and again.base is None and "training" not in again.layers


def test_the_data_is_indexed_once_and_what_is_left_out_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="smolforge")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name, text in {"a.txt": "Once upon a time there was a fox.\n" * 5_000, "b.png": "x", "c.txt": ""}.items():
        (tmp_path / "texts" / name).write_text(text)
    monkeypatch.setattr(auto, "measure_speed", lambda *_, **__: {"tokens_per_second": 1_000.0})
    built: list[object] = []
    build_index = indexing.build_index
    monkeypatch.setattr(
        indexing, "build_index", lambda specs, context: built.append(specs) or build_index(specs, context)
    )
    rehearse(auto.choose(TrainRequest(layers={"data": {"sources": {"texts": 1.0}}}), None))
    assert built == [[str(tmp_path / "texts")]]
    assert caplog.text.count("1 .png") == caplog.text.count("1 empty file passed over") == 1
