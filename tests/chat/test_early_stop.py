"""Scores before the first step, the end by the held-out loss, the best checkpoint, and a warning about muon."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from chat_files import conversations, rows_of, write
from chat_runs import steps_of, weights_of, words

from smolforge.cli import run as smolforge
from smolforge.files import read_json_lines
from smolforge.metrics_log import read_metrics
from smolforge.run import Run


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    return write(place / "chat.jsonl", rows_of(conversations(24)))


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    """So fast that it forgets what it did not see."""
    often = [
        "--set",
        "samples.prompts=[Tell me]",
        "--set",
        "evaluation.every=3",
        "--set",
        "checkpoint.every=3",
        "--set",
        "checkpoint.keep=1",
    ]
    return words(base, data, out, "--lr", "0.03", "--set", "training.steps=60", *often, *more)


@pytest.fixture(scope="module")
def stopped(place: Path, base: Path, data: Path) -> Run:
    run = Run(place / "stopped")
    assert smolforge(command(base, data, run.path, "--set", "evaluation.patience=2")) == 0
    return run


def validations(run: Run) -> list[tuple[int, float]]:
    return [(row["step"], row["validation"]["loss"]) for row in read_metrics(run) if "validation" in row]


def test_it_ends_when_the_held_out_loss_rises_and_keeps_the_best(stopped: Run) -> None:
    found = validations(stopped)
    best = min(found, key=lambda pair: pair[1])[0]
    assert best > 0 and found[-1][0] == best + 6 == steps_of(stopped)[-1][0] < 60
    checkpoints = stopped.checkpoints_path
    assert (checkpoints / "best").resolve().name == f"step-{best:08d}"
    assert (checkpoints / "last").resolve().name == f"step-{best + 6:08d}"


def test_the_model_is_scored_and_asked_before_it_is_tuned(stopped: Run) -> None:
    assert validations(stopped)[0][0] == 0
    samples = list(read_json_lines(stopped.samples_path))
    assert {row["step"] for row in samples} >= {0, steps_of(stopped)[-1][0]}
    page = stopped.report_path.read_text()
    assert all(row["prompt"][:20] in page for row in samples)


def test_the_same_command_finds_it_complete_and_more_steps_continue(
    place: Path, base: Path, data: Path, stopped: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights_of(stopped)
    assert smolforge(command(base, data, stopped.path, "--set", "evaluation.patience=2")) == 0
    assert "the held-out loss is lowest at step" in capsys.readouterr().err and weights_of(stopped) == before
    # Without patience it is a run that was interrupted, and it goes on.
    shutil.copytree(stopped.path, place / "more", symlinks=True)
    unending = ["--set", "evaluation.patience=null"]
    length = steps_of(stopped)[-1][0] + 3
    assert smolforge(command(base, data, place / "more", "--set", f"training.steps={length}", *unending)) == 0
    assert [step for step, *_ in steps_of(Run(place / "more"))] == list(range(1, length + 1))


def test_muon_on_weights_that_adamw_made_is_warned_of(
    place: Path, base: Path, data: Path, stopped: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    muon = ["--set", "optimizer.name=muon", "--set", "training.steps=2"]
    assert smolforge(words(base, data, place / "muon", *muon)) == 0
    assert "adamw made these weights" in capsys.readouterr().err
    card = (place / "muon" / "checkpoints" / "last" / "README.md").read_text()
    assert "| optimizer | muon," in card
    for start, warned in ((place / "muon", False), (stopped.path, True)):
        out = place / f"muon-{warned}"
        assert smolforge(words(start, data, out, *muon)) == 0
        assert ("made these weights" in capsys.readouterr().err) == warned
