"""The data of a run: where its sources lie, and what happens where they moved or changed.

What counts is what the data is, which the hash of the index says, and not where it lies or how its path is spelled.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from smolforge.checkpoint import commit
from smolforge.config import RunConfig
from smolforge.data import Corpus
from smolforge.data.sources import absolute, expand_names
from smolforge.distributed import DistributedContext
from smolforge.errors import BadInput, SourceChanged
from smolforge.formatting import plural
from smolforge.run import Run

logger = logging.getLogger(__name__)


def keep_places(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths, of sources, tokenizer and `init`: a run is resumed from any directory.

    Short names of sources are replaced by what they stand for, which a later release may choose otherwise.
    """
    sources: dict[str, float] = {}
    for source, weight in expand_names(_without_empty_files(config.data.sources)).items():
        sources[absolute(source)] = sources.get(absolute(source), 0.0) + weight
    places = {
        key: os.path.abspath(path)  # noqa: PTH100 (links stay: `last` of a run may point elsewhere later)
        for key in ("tokenizer", "init")
        if isinstance(name := getattr(config, key), str) and (path := Path(name).expanduser()).exists()
    }
    return config.model_copy(update=places).with_keys("data", sources=sources)


def _without_empty_files(sources: dict[str, float]) -> dict[str, float]:
    """The sources without empty files, which a shell's `*.txt` names like others; all where nothing else is left."""
    empty = [source for source in sources if (path := Path(source)).is_file() and not path.stat().st_size]
    if not empty or len(empty) == len(sources):
        return sources
    logger.warning(
        f"{plural(len(empty), 'empty file')} passed over: {', '.join(empty[:5])}{', …' if len(empty) > 5 else ''}"
    )
    return {source: weight for source, weight in sources.items() if source not in empty}


def check_weights(run: Run, saved: RunConfig, changed: RunConfig) -> RunConfig:
    """`changed` with its sources in the order of the run, which its stream depends on.

    Raises:
        BadInput: it has more or fewer sources than the run, or other weights.
    """
    was, now = saved.data.sources, changed.data.sources
    if was.keys() == now.keys():
        now = {source: now[source] for source in was}
    different = [b for (a, weight), b in zip(was.items(), now, strict=False) if weight != now[b]]
    if len(was) != len(now) or different:
        message = f"{run.path} was started with other weights of its sources"
        if was.keys() != now.keys():
            message = _other_data(run, list(was), list(now))
        hint = "Give another directory with --out, or --fresh to start over."
        raise BadInput(message, field=f"data.sources.{[*different, *now][0]}", hint=hint)
    return changed.with_keys("data", sources=now)


def _other_data(run: Run, was: list[str], now: list[str]) -> str:
    return f"{run.path} was started on other data ({', '.join(was)}), not {', '.join(now)}"


def open_corpus(
    run: Run, config: RunConfig, newest: Path | None, ranks: DistributedContext, made: dict[str, Any] | None, *,
    accept_changes: bool,
) -> Corpus:  # fmt: skip
    """The data of the run. Rank 0 makes the index of a new run; the others open the same index.

    Args:
        newest: the checkpoint that the run continues from.
        made: an index of the same data, which a new run takes over.
        accept_changes: continue with data that changed, and record from which step on.

    Raises:
        SourceChanged: the data is not what the run was started on.
    """
    index = ranks.broadcast((run.read_index() or made) if ranks.is_main else None)
    corpus = _open_on_main(run, config, index, newest, accept_changes) if ranks.is_main else None
    index = ranks.broadcast(corpus.index if corpus else None)
    return corpus or Corpus.open(config.data, index=index, cache_dir=run.path / "cache")


def _open_on_main(
    run: Run, config: RunConfig, index: dict[str, Any] | None, newest: Path | None, accept_changes: bool
) -> Corpus:
    cache, specs = run.path / "cache", list(config.data.sources)
    if index is None:
        corpus = Corpus.open(config.data, cache_dir=cache)
        run.write_index(corpus.index)
        return corpus
    was = [entry["source"] for entry in index["sources"]]
    try:
        corpus = Corpus.open(config.data, index=index, cache_dir=cache)
    except SourceChanged as error:
        if newest is None or not accept_changes:
            problem = error.message if was == specs else f"{_other_data(run, was, specs)}: {error.message}"
            raise SourceChanged(problem, field=error.field, hint=error.hint) from None
        corpus = Corpus.open(config.data, cache_dir=cache)
        step = commit.step_of(newest) or 0
        logger.warning(f"{error.message}. Accepted: the run has the new data from step {step:,} on")
        change = {"step": step, "was": index["hash"], "problem": error.message}
        corpus.index["accepted"] = [*index.get("accepted", []), change]
    else:
        for old, new in zip(was, specs, strict=True):
            if old != new:
                logger.info(f"data: {old} is now read from {new}, with the same content")
        for entry, spec in zip(corpus.index["sources"], specs, strict=True):
            entry["source"] = spec
    run.write_index(corpus.index)
    return corpus
