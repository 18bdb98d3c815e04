"""Sweeps: the values of a file, rounds, a table that a stop does not change, errors of single trials, and the winner."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch import ENVIRONMENT
from tiny import TINY, steps_of, validations_of, weights_of

from smolforge import cli
from smolforge.cli.sweep import EXAMPLES
from smolforge.config import build_config
from smolforge.errors import BadInput
from smolforge.formatting import number
from smolforge.metrics_log import read_metrics
from smolforge.run import Run
from smolforge.training import trials
from smolforge.training.setup import TrainRequest
from smolforge.training.sweep_file import Halving, Sweep, read_sweep, trial_name
from smolforge.training.train import run_training


def written(place: Path, **changes: Any) -> Path:
    """A sweep of the tiny run, as a file."""
    (place / "base.yaml").write_text(yaml.safe_dump(TINY))
    settings = {
        "base": str(place / "base.yaml"),
        "set": {"training.steps": 24, "evaluation.every": None, "evaluation.tokens": 500, "checkpoint.every": 8},
        "keys": {"optimizer.lr": {"log": [0.001, 0.1]}},
    }
    path = place / "lr.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}, sort_keys=False))
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Trials train in this process, one by one; (name, steps) of each that was started."""
    started = []

    class Ended:
        def __init__(self, code: int) -> None:
            self.code = code

        def poll(self) -> int:
            return self.code

    def start(trial: trials.Trial, until: int, threads: int, place: int) -> Any:
        started.append((trial.name, until))
        trial.log.parent.mkdir(parents=True, exist_ok=True)
        trial.log.write_text("")
        request = {**json.loads(json.dumps(trial.request)), "out": trial.run.path, "until": until}
        try:
            return Ended(run_training(TrainRequest(**request))[1].exit_code)
        except BadInput as error:
            trial.log.write_text(f"a line before it\nerror: {error}\n")
            return Ended(2)

    monkeypatch.setattr(trials.Trial, "start", start)
    monkeypatch.setattr(trials, "POLL_SECONDS", 0.0)
    return started


def test_the_values_of_ranges_lists_and_draws() -> None:
    keys = {"optimizer.lr": {"log": [1e-3, 1e-1]}, "model.hidden_size": {"linear": [64, 128], "points": 4}}
    grid = Sweep.model_validate({"keys": {**keys, "optimizer.name": ["adamw", "muon"]}}).candidates()
    assert len(grid) == 24
    assert sorted({values["optimizer.lr"] for values in grid}) == [0.001, 0.01, 0.1]
    assert sorted({values["model.hidden_size"] for values in grid}) == [64, 85, 107, 128]
    twice = {"model.num_hidden_layers": {"linear": [1, 2], "points": 4}, "optimizer.lr": [1, 1.0, "1"]}
    once = Sweep.model_validate({"keys": twice, "seeds": [3, 0, 3]})
    assert [values["model.num_hidden_layers"] for values in once.candidates()] == [1, 2] and once.all_seeds() == [3, 0]
    few, more = (
        Sweep.model_validate({"keys": keys, "method": "random", "trials": trials, "seed": 3}).candidates()
        for trials in (5, 9)
    )
    assert more[:5] == few and len(more) == 9 and all(0.001 <= values["optimizer.lr"] <= 0.1 for values in more)
    assert Sweep.model_validate({"keys": {"optimizer.lr": ["1e-3", 2]}}).candidates()[0] == {"optimizer.lr": 0.001}
    assert Halving(steps=100).rounds(1000) == [100, 300, 900, 1000] and Halving(steps=100).rounds(50) == [50]
    assert trial_name({"optimizer.lr": 0.003, "a.lr": 1}, 2) == "optimizer.lr=0.003,a.lr=1,seed=2"
    names = {trial_name({"optimizer.betas": betas}, 0) for betas in ([0.9, 0.95], [0.9, 0.96])}
    assert len(names) == 2 and all("/" not in name and " " not in name for name in names)


def test_the_files_of_the_page_and_of_the_help_can_be(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text()
    example = EXAMPLES.partition(":\n")[2].partition("\n\n")[0]
    texts = [*re.findall(r"```yaml\n(.*?)```", page, re.DOTALL), textwrap.dedent(example)]
    assert len(texts) == 2
    for text in texts:
        (tmp_path / "sweep.yaml").write_text(text)
        sweep = read_sweep(tmp_path / "sweep.yaml")
        assert len(sweep.candidates()) >= 6
        for values in sweep.candidates():
            build_config(sweep.base, **sweep.layers(values, 0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keys": {}}, "at least 1 item"),
        ({"kees": {}}, "kees"),
        ({"method": "random"}, "needs a number of trials"),
        ({"seeds": []}, "at least one seed is needed"),
        ({"seeds": 0}, "at least one seed is needed"),
        ({"keys": {"optimizer.lr": {"log": [0.1, 0.01]}}}, "keys.optimizer.lr: a range goes from a lower to a higher"),
        ({"keys": {"optimizer.lrr": [1]}}, "Did you mean 'lr'"),
        ({"set": {"data.holdout": 0}}, "none is held out"),
        ({"set": {"training.epochs": 2}}, "training.steps or training.tokens"),
    ],
)
def test_a_wrong_file_is_one_error(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["sweep", str(written(tmp_path, **changes)), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_rounds_a_failing_trial_and_the_winner(
    tmp_path: Path, in_process: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"optimizer.lr": [0.00001, 0.01], "tokenizer.train.vocab_size": [320, 400], "training.micro_batch": [2, 3]}
    file, out = written(tmp_path, keys=keys, halving={"steps": 8, "factor": 3}, seeds=1), tmp_path / "out"
    words = ["sweep", str(file), "--out", str(out), "--jobs", "2"]
    assert cli.run([*words, "--json"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["candidates"]
    ranked = [row for row in rows if row["scores"]]
    # Three in a micro-batch divide no step, and 400 tokens do not fit a model of 320: six of eight.
    assert len(rows) == 8 and [row["steps"] for row in ranked] == [24, 8]
    assert ranked[0]["values"]["optimizer.lr"] == 0.01 and ranked[0]["mean"] < ranked[1]["mean"]
    assert sum("divide" in (row["error"] or "") for row in rows) == 4 and captured.err.count("400") >= 2
    assert captured.err.count("tokenizer: training") == 2, "one of each size, for four trials"
    best = Run(out / "trials" / "lr=0.01,vocab_size=320,micro_batch=2,seed=0")
    scores = {r["step"]: r["validation"]["bits_per_byte"] for r in read_metrics(best) if "validation" in r}
    assert ranked[0]["mean"] == min(scores.values()) and set(scores) == set(range(2, 25, 2))
    text, page = ((out / name).read_text() for name in ("sweep.md", "sweep.html"))
    first = next(line for line in text.splitlines() if line.startswith("|") and "0.01" in line)
    assert number(ranked[0]["mean"]) in first and text.count(" failed: ") == 6
    assert "uPlot" in page and "Against optimizer.lr" in page and page.count(" failed: ") == 6
    config = build_config(str(out / "best.yaml"))
    assert config.optimizer.lr == 0.01 and config.training.steps == 24 and config.model.hidden_size == 32
    # Stopped after its first round and continued, it is the run that never stopped.
    sweep = read_sweep(file)
    layers = sweep.layers(ranked[0]["values"], 0)
    whole, _ = run_training(TrainRequest(sweep.base, layers=layers, out=tmp_path / "whole"))
    for part in (steps_of, validations_of, weights_of):
        assert part(best) == part(whole)
    # What is complete is not trained again, what failed is tried again.
    done = len(in_process)
    assert cli.run(words) == 0
    assert {name for name, _ in in_process[done:]} == {name for name, _ in in_process if "400" in name}
    file.write_text(file.read_text().replace("training.steps: 24", "training.steps: 30"))
    assert cli.run(words) == 2
    assert "Give another directory with --out" in capsys.readouterr().err


def test_a_dry_run_tells_trials_and_cost(
    tmp_path: Path, in_process: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, halving={"steps": 8, "factor": 3}, seeds=2)
    assert cli.run(["sweep", str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "lr=0.01,seed=1" in told and "3 candidates to step 8" in told and "1 candidate to step 24" in told
    # Two seeds: three candidates for 8 steps, then one for 16, of 256 tokens each.
    assert f"6 trials, {(2 * (3 * 8 + 16) * 256) / 1000:.1f}k tokens" in told
    assert not in_process and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_random_gives_the_same_table(tmp_path: Path) -> None:
    settings = {"training.steps": 24, "evaluation.every": 4, "evaluation.tokens": 500, "checkpoint.every": 2}
    keys, halving = {"optimizer.lr": [0.001, 0.01]}, {"steps": 8, "factor": 3}
    file = written(tmp_path, seeds=2, keys=keys, halving=halving, set=settings)

    def start(out: str) -> subprocess.Popen[str]:
        words = ["sweep", str(file), "--out", str(tmp_path / out), "--jobs", "2", "--json"]
        command = [sys.executable, "-m", "smolforge", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)

    def logged(out: str) -> int:
        rows = (tmp_path / out / "trials").glob("*/metrics.jsonl")
        return sum(len(path.read_bytes().splitlines()) for path in rows)

    def table(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
        out, err = process.communicate(timeout=3600)
        assert process.returncode == 0, err
        return [{**row, "seconds": None} for row in json.loads(out)["candidates"]]

    whole = table(start("whole"))
    dice = random.Random(5)
    for sent in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process, wanted = start("killed"), logged("killed") + dice.randint(1, 25)
        while process.poll() is None and logged("killed") < wanted:
            time.sleep(0.02)
        process.send_signal(sent)
        out, _ = process.communicate(timeout=600)
        if process.returncode == 0:  # it had ended before
            assert [{**row, "seconds": None} for row in json.loads(out)["candidates"]] == whole
        else:
            assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    assert table(start("killed")) == whole
    assert [row["steps"] for row in whole] == [24, 8]
    assert all(len(row["scores"]) == 2 and row["spread"] > 0 for row in whole)
