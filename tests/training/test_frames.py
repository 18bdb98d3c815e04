"""Frames: the models of a run's beginning, kept for the time-lapse when its checkpoints are gone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import steps_of, weights_of

from smolforge.checkpoint import commit
from smolforge.checkpoint.locate import load_model
from smolforge.errors import RunFailed
from smolforge.run import Run
from smolforge.serving.state import ModelSource
from smolforge.training import checkpointing
from smolforge.training.checkpointing import frame_steps


def test_frames_are_at_1_3_10_and_30_percent() -> None:
    assert frame_steps(900) == {9, 27, 90, 270}
    assert frame_steps(20) == {2, 6} and frame_steps(3) == set()


def test_a_run_keeps_its_beginning_and_computes_the_same(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"training": {"steps": 40}, "checkpoint": {"every": 5, "keep": 1, "best": False}}
    run = make_run("with", **few)
    frames = commit.steps(run.frames_path)
    assert frames == [1, 4, 12] and commit.steps(run.checkpoints_path) == [40]
    assert all(not commit.verify(run.frames_path / commit.step_name(step), training=False) for step in frames)
    first, _, _ = load_model(run.frames_path / commit.step_name(1))
    assert next(first.parameters()).dtype == torch.bfloat16
    assert not (run.frames_path / commit.step_name(1) / commit.TRAINING).exists()
    source = ModelSource(str(run.path))
    assert source.timelapse_steps() == [1, 4, 12, 40] and source.steps() == [40]
    monkeypatch.setattr(checkpointing, "frame_steps", lambda total: set())
    without = make_run("without", **few)
    assert steps_of(run) == steps_of(without) and weights_of(run) == weights_of(without)


def test_a_frame_is_the_model_of_its_step(make_run: Callable[..., Run]) -> None:
    run = make_run(checkpoint={"every": 2, "keep": 20})
    for step in (2, 6):
        frame, _, _ = load_model(run.frames_path / commit.step_name(step))
        whole, _, _ = load_model(run.checkpoints_path / commit.step_name(step))
        for (name, kept), (_, exact) in zip(frame.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(kept, exact.to(torch.bfloat16)), name


def test_a_frame_that_cannot_be_written_does_not_end_the_run(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = commit.commit

    def full(folder: Path, step: int, write: Callable[[Path], None], **more: object) -> Path:
        if folder.name == "frames":
            raise RunFailed("no room on the disk")
        return real(folder, step, write, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(commit, "commit", full)
    with caplog.at_level(logging.WARNING):
        run = make_run()
    assert "step 2 is not kept for the time-lapse: no room on the disk" in caplog.text
    assert commit.newest_whole(run.checkpoints_path) is not None and not run.frames_path.exists()
