"""Held-out text of a run: exactly what its training never saw, whatever part of the run's text is scored."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from tiny import make_run  # noqa: F401

import smolforge
from smolforge.config import DataConfig
from smolforge.data import Corpus
from smolforge.errors import DataError
from smolforge.run import Run


def test_it_is_what_the_run_held_out(make_run: Callable[..., Run], tmp_path: Path) -> None:  # noqa: F811
    lines = [f"Line {i} of a small file, which says {i * i % 97} and no more." for i in range(400)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    for name in ("a", "b"):
        rows = [{"text": f"document {i} of {name}, which is short"} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"sequence_length": 32, "lanes": 4, "workers": 1, "holdout": 0.03}
    separated = {"sources": {str(tmp_path / "lines.txt"): 1.0}, "separator": "\n", **shared}
    several = {"sources": {str(tmp_path / f"{name}.jsonl"): 1.0 for name in "ab"}, **shared}
    for number, data in enumerate((separated, several)):
        run = make_run(f"run-{number}", data=data, training={"steps": 1})
        with Corpus.open(DataConfig(**data)) as corpus:
            unseen = [document.text for document in corpus.documents(held_out=True)]
        scored = smolforge.evaluate(run.path, data["sources"], held_out=True)
        assert scored.documents == len(unseen) and scored.n_bytes == sum(len(text.encode()) for text in unseen)
        alone = []
        for source in data["sources"]:
            with contextlib.suppress(DataError):  # nothing of one of them was held out
                alone.append(smolforge.evaluate(run.path, source, held_out=True).documents)
        assert sum(alone) == len(unseen)
