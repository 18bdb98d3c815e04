"""--profile: a trace that Perfetto opens, of a few steps, and nothing about the run changes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import steps_of, weights_of

from smolforge.run import Run
from smolforge.training import progress


def trace_of(run: Run) -> tuple[Path, list[dict]]:
    """The one trace, and its complete events with a name, a beginning and a length."""
    (path,) = (run.path / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return path, [e for e in events if e.get("ph") == "X" and {"name", "ts", "dur", "pid", "tid"} <= e.keys()]


def test_a_trace_of_three_steps_and_an_equal_run(make_run: Callable[..., Run]) -> None:
    watched = make_run("watched", request={"profile": True}, training={"steps": 12})
    plain = make_run("plain", training={"steps": 12})
    path, events = trace_of(watched)
    assert path.name == "step-00000008.json.gz"  # four left out, one of the profiler's own, three seen
    names = [event["name"] for event in events]
    for label in ("wait for data", "forward", "backward", "update"):
        assert names.count(label) >= progress.STEPS, label
    assert names.count("update") == progress.STEPS
    assert any(name.startswith("aten::") for name in names)
    assert steps_of(watched) == steps_of(plain)
    assert weights_of(watched) == weights_of(plain)
    assert not (plain.path / "profile").exists()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_short_run_has_a_trace_too(make_run: Callable[..., Run], steps: int) -> None:
    run = make_run(request={"profile": True}, training={"steps": steps})
    _, events = trace_of(run)
    assert "forward" in {event["name"] for event in events}


def test_the_run_continues_when_the_trace_cannot_be_written(
    make_run: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    first = make_run("run", training={"steps": 2})
    (first.path / "profile").write_text("in the way")
    make_run("run", request={"profile": True, "more_steps": 4})
    assert steps_of(first)[-1][0] == 6
    assert "could not be written" in caplog.text
