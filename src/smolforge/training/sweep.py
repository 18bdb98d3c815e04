"""`smolforge sweep`: one configuration with other values, and which of them predict held-out text best.

Nothing is kept but the runs themselves: a sweep that was killed finds in their metrics what is done, and each run
continues as runs do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from smolforge.config import RunConfig, build_config
from smolforge.config.layers import merge, read_file
from smolforge.data import Corpus
from smolforge.devices import choose_device
from smolforge.errors import BadInput, RunFailed, SmolforgeError
from smolforge.files import write_atomically
from smolforge.formatting import number, plural, setting
from smolforge.limits import available_memory, physical_cores
from smolforge.report.history import read_history, summarize
from smolforge.report.sweep import markdown, write_sweep_page
from smolforge.run import Run, lock_run
from smolforge.training.auto import measure_speeds
from smolforge.training.plan import make_plan, planned_memory
from smolforge.training.prepare import train_tokenizer
from smolforge.training.recipe import resolve_batch
from smolforge.training.run_data import keep_places
from smolforge.training.sweep_file import Sweep, trial_name
from smolforge.training.trials import Trial, train_all

logger = logging.getLogger(__name__)

CORES_EACH = 4  # of a trial where there are many: small models do not become faster with more
MEMORY_SHARE = 0.8  # of what is free
TEXTS = {"sources", "format", "text_column", "separator", "on_error", "holdout"}  # keys of data that texts depend on


@dataclass
class Candidate:
    """A combination of values with a trial for each seed, and what came of it.

    Attributes:
        configs: of each trial; empty where the values cannot be, as `error` says.
        memory: bytes that a trial takes.
        rounds: that it came through; without halving there is one.
        steps: at which its last scores were taken.
        scores: the lowest held-out value of each trial.
    """

    values: dict[str, Any]
    trials: list[Trial]
    configs: list[RunConfig] = field(default_factory=list)
    memory: int = 0
    error: str | None = None
    rounds: int = 0
    steps: int = 0
    scores: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Of the scores; infinite without any."""
        return statistics.fmean(self.scores) if self.scores else math.inf

    def as_dict(self) -> dict[str, Any]:
        """The row of the table: tokens and seconds are those of all its trials."""
        summaries = [summarize(read_history(trial.run)) for trial in self.trials if trial.run.exists]
        tokens, seconds = (sum(getattr(each, name) or 0 for each in summaries) for name in ("tokens", "seconds"))
        return {
            "values": self.values,
            "mean": self.mean if self.scores else None,
            "spread": statistics.stdev(self.scores) if len(self.scores) > 1 else None,
            "scores": self.scores,
            "rounds": self.rounds,
            "steps": self.steps,
            "tokens": int(tokens),
            "seconds": round(seconds, 1),
            "error": self.error,
        }


def open_sweep(sweep: Sweep, folder: Path) -> list[Candidate]:
    """All combinations of a sweep; one that no configuration can have carries the error.

    Raises:
        BadInput: no combination is possible, or the folder holds a sweep of another base, of other data or settings.
    """
    _check_folder(sweep, folder)
    candidates, problems, device = [], [], choose_device()
    for values in sweep.candidates():
        layers = [(seed, sweep.layers(values, seed)) for seed in sweep.all_seeds()]
        trials = [
            Trial(folder, trial_name(values, seed), {"base": sweep.base, "layers": tree}, sweep.metric)
            for seed, tree in layers
        ]
        candidates.append(found := Candidate(values, trials))
        try:
            configs = [resolve_batch(build_config(sweep.base, **tree), device) for _, tree in layers]
            memory = planned_memory(configs[0], make_plan(configs[0], device, 1))
        except BadInput as error:
            found.error = " ".join(str(error).split())
            problems.append(error)
        else:
            found.configs, found.memory = configs, memory.total
    if len(problems) == len(candidates):
        raise problems[0]
    for config in (config for candidate in candidates for config in candidate.configs):
        if not config.data.holdout:
            raise BadInput("a sweep compares held-out text, and none is held out", field="data.holdout")
        if config.training.epochs and not config.training.steps:
            hint = "Give training.steps or training.tokens."
            raise BadInput("a sweep needs to know the steps of a trial", field="training.epochs", hint=hint)
    return candidates


def _check_folder(sweep: Sweep, folder: Path) -> None:
    path = folder / "sweep.yaml"
    if not path.is_file():
        if folder.is_dir() and any(entry.name != "lock" for entry in folder.iterdir()):
            raise BadInput(f"{folder} is not empty and holds no sweep", field="--out", hint="Give another directory.")
        return
    before = Sweep.model_validate(read_file(path))
    for key in ("base", "data", "set"):
        was, wanted = getattr(before, key), getattr(sweep, key)
        if was != wanted:
            hint = "Give another directory with --out. Values of keys, trials and seeds may be added to a sweep."
            raise BadInput(f"the trials in {folder} have {was}, not {wanted}", field=key, hint=hint)


def count_jobs(candidates: Sequence[Candidate]) -> tuple[int, str]:
    """How many trials fit this machine at a time, and why."""
    if choose_device().type == "cuda":
        return torch.cuda.device_count(), "one for each GPU"
    needed = max(candidate.memory for candidate in candidates)
    cores, free = physical_cores(1), available_memory() * MEMORY_SHARE
    jobs = min(max(cores // CORES_EACH, min(cores, 2)), max(int(free / needed), 1))
    return jobs, f"{plural(cores, 'core')}; a trial takes about {needed / 1e9:.2f} of {free / 1e9:.2f} GB"


def rounds_of(sweep: Sweep, candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
    """(how many candidates, to which step) of each round, if none fails."""
    totals = [config.total_steps for candidate in candidates for config in candidate.configs]
    ends = sweep.halving.rounds(max(totals)) if sweep.halving else [max(totals)]
    count = sum(bool(candidate.configs) for candidate in candidates)
    factor = sweep.halving.factor if sweep.halving else 1
    return [(max(count // factor**i, 1), end) for i, end in enumerate(ends)]


def forecast_sweep(sweep: Sweep, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Trials, tokens and seconds of a sweep; the speed is measured for a second, with the base on the whole machine."""
    configs = [candidate.configs for candidate in candidates if candidate.configs]
    speeds = measure_speeds(sweep.base, [], [build_config(sweep.base), *(each[0] for each in configs)])[1:]
    rounds, tokens, seconds, done = rounds_of(sweep, candidates), 0.0, 0.0, 0
    for count, end in rounds:
        for each, speed in zip(configs, speeds, strict=True):  # of which any may be the best
            new = sum(max(min(end, c.total_steps) - done, 0) * c.tokens_per_step for c in each) * count / len(configs)
            tokens, seconds = tokens + new, seconds + new / speed
        done = end
    return {
        "trials": sum(map(len, configs)), "rounds": rounds, "tokens": round(tokens), "seconds": round(seconds, 1),
        "candidates": [{"values": each.values, "error": each.error} for each in candidates],
    }  # fmt: skip


def run_sweep(sweep: Sweep, folder: Path, candidates: list[Candidate], jobs: int) -> list[dict[str, Any]]:
    """Train what is not trained yet, and write sweep.md, sweep.html and best.yaml; the rows of the table, best first.

    Raises:
        RunFailed: no trial came to its end.
        RunLocked: another process runs this sweep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run(Run(folder)):
        settings = yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(folder / "sweep.yaml", settings)
        _share_tokenizers(folder, candidates)
        ranked = _train(sweep, candidates, jobs)
        rows = [candidate.as_dict() for candidate in ranked]
        _write(sweep, folder, ranked, rows)
    return rows


def _share_tokenizers(folder: Path, candidates: Sequence[Candidate]) -> None:
    """Train each tokenizer once for all trials that would train the same; where that fails, they say why."""
    for candidate in candidates:
        # There are no configurations where the values cannot be.
        for trial, config in zip(candidate.trials, candidate.configs, strict=False):
            if isinstance(config.tokenizer, str) or config.init or trial.run.exists:
                continue
            data, longest = keep_places(config).data, config.model.max_position_embeddings
            parts = (config.tokenizer.model_dump(), data.model_dump(include=TEXTS), longest)
            place = folder / "tokenizers" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
            with contextlib.suppress(SmolforgeError):
                if not place.is_dir():
                    unfinished = place.with_suffix(".tmp")
                    shutil.rmtree(unfinished, ignore_errors=True)
                    with Corpus.open(data) as corpus:
                        train_tokenizer(config, corpus, unfinished)
                    unfinished.rename(place)
                trial.request["tokenizer"] = str(place)


def _train(sweep: Sweep, candidates: list[Candidate], jobs: int) -> list[Candidate]:
    """The candidates, those of the last round first and of these the best.

    Raises:
        RunFailed: no trial came to its end.
    """
    alive = [candidate for candidate in candidates if candidate.configs]
    rounds, threads = rounds_of(sweep, candidates), max(physical_cores(1) // jobs, 1)
    for i, (count, end) in enumerate(rounds, 1):
        alive = alive[:count]
        if len(rounds) > 1:
            logger.info(f"round {i} of {len(rounds)}: {plural(len(alive), 'candidate')} to step {end:,}")
        pairs = [pair for each in alive for pair in zip(each.trials, each.configs, strict=True)]
        goals = {trial: min(end, config.total_steps) for trial, config in pairs}
        train_all(goals, jobs, threads)
        for each in alive:
            each.error = next((trial.error for trial in each.trials if trial.error), None)
            if each.error is None:
                each.rounds, each.steps = i, goals[each.trials[0]]
                scores = [trial.score(goals[trial]) for trial in each.trials]
                each.scores = [score for score in scores if score is not None]
        alive = sorted((each for each in alive if each.error is None), key=lambda each: each.mean)
    if not any(candidate.scores for candidate in candidates):
        raise RunFailed("no trial of the sweep came to its end", hint="The messages above say why, the logs say more.")
    return sorted(candidates, key=lambda each: (-each.rounds, each.mean))


def _write(sweep: Sweep, folder: Path, ranked: Sequence[Candidate], rows: Sequence[dict[str, Any]]) -> None:
    """The table, the page, and the winner as a file that `smolforge train` takes."""
    metric, best = sweep.metric.replace("_", " "), rows[0]
    chosen = ", ".join(f"{key}={setting(value)}" for key, value in best["values"].items())
    outcome = f"Best of {plural(len(rows), 'candidate')}: {chosen}, {number(best['mean'])} {metric} held out"
    outcome += f" (mean of {plural(len(best['scores']), 'seed')}, {plural(best['steps'], 'step')})."
    table = markdown(rows, metric)
    train = f"`smolforge train {folder / 'best.yaml'}` trains with the best values."
    write_atomically(folder / "sweep.md", f"# Sweep of {sweep.base}\n\n{outcome}\n{train}\n\n{table}")
    runs = [candidate.trials[0].run.path for candidate in ranked]
    write_sweep_page(folder / "sweep.html", f"Sweep of {sweep.base}", outcome, rows, metric, runs)
    is_file = sweep.base.endswith((".yaml", ".yml"))
    tree: dict[str, Any] = read_file(Path(sweep.base)) if is_file else {"preset": sweep.base}
    merge(tree, sweep.chosen(best["values"]))
    preset = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    write_atomically(folder / "best.yaml", f"# {outcome}\n{preset}")
