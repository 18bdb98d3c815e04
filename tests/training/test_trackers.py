"""Missing, broken, slow or dead trackers never stop a run, and each failure gives one warning."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import steps_of, weights_of

from smolforge.errors import BadInput
from smolforge.run import Run
from smolforge.training.trackers import Trackers

CONFIG = {"logging": {"project": "tales"}, "optimizer": {"lr": 0.003}}


class Fake:
    """A stand-in for wandb and trackio, which does what a test tells it to."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.fail: dict[str, BaseException] = {}
        self.hang: set[str] = set()
        self.release = threading.Event()
        self.hanging = threading.Event()

    def _do(self, what: str) -> None:
        if what in self.hang:
            self.hanging.set()
            self.release.wait(60)
        if what in self.fail:
            raise self.fail[what]

    def init(self, **settings: Any) -> Fake:
        self._do("init")
        self.started.append(settings)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self._do("log")
        self.rows.append((step, values))

    def finish(self) -> None:
        self._do("finish")
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fake(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    fake = Fake()
    module = ModuleType(name)
    module.__dict__.update(init=fake.init, Html=lambda text: ("html", text), Markdown=lambda text: ("markdown", text))
    monkeypatch.setitem(sys.modules, name, module)
    yield fake
    fake.release.set()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run")


class Records(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.emit = self.records.append  # type: ignore[method-assign]


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    """The warnings of the trackers."""
    handler = Records()
    logger = logging.getLogger("smolforge.training.trackers")
    logger.addHandler(handler)
    yield handler.records
    logger.removeHandler(handler)


def test_rows_arrive_whole_and_in_order(name: str, fake: Fake, run: Run, said: list[logging.LogRecord]) -> None:
    with closing(Trackers([name], run, CONFIG)) as trackers:
        for step in range(100):
            trackers.scalars(step, {"loss": step / 2, "mfu": None, "grad_norm": float("nan"), "data_digest": "00"})
        trackers.text(99, "samples/Once", "<b>a ```` b</b>")
    assert fake.rows[:-1] == [(step, {"loss": step / 2}) for step in range(100)]
    step, [(tag, (kind, text))] = fake.rows[-1][0], fake.rows[-1][1].items()
    assert (step, tag) == (99, "samples/Once")
    assert "<b>" not in text if kind == "html" else text.startswith("`````\n<b>a ```` b")
    assert fake.finished == 1 and said == []
    assert fake.started[0]["project"] == "tales" and fake.started[0]["config"] == CONFIG


def test_a_resumed_run_goes_on_in_the_same_place(name: str, fake: Fake, run: Run) -> None:
    for resume_step in (None, 40):
        Trackers([name], run, CONFIG, resume_step=resume_step).close()
    first, second = fake.started
    assert first["resume"] == second["resume"] == "allow"
    assert (first.get("id"), first["name"]) == (second.get("id"), second["name"])


def test_a_tracker_that_is_not_installed(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch, said: list[logging.LogRecord]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with closing(Trackers([name], run, CONFIG)) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    assert (
        len(said) == 1 and said[0].getMessage().startswith(f"{name} is off") and "pip install" in said[0].getMessage()
    )


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no\nnetwork"), SystemExit(1), ConnectionError("refused")], ids=repr)
def test_a_tracker_that_raises(
    name: str, fake: Fake, run: Run, where: str, error: BaseException, said: list[logging.LogRecord]
) -> None:
    fake.fail[where] = error
    trackers = Trackers([name], run, CONFIG, queue_rows=10_000)
    for step in range(200):
        trackers.scalars(step, {"loss": 1.0})
    trackers.close()
    trackers.close()
    assert len(said) == 1 and type(error).__name__ in said[0].getMessage() and "\n" not in said[0].getMessage()
    assert {record.thread for record in said} == {threading.get_ident()}, (
        "only the run's own thread may use its terminal"
    )
    assert trackers.open == {}


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_tracker_that_hangs_is_dropped_when_its_queue_is_full(
    name: str, fake: Fake, run: Run, where: str, monkeypatch: pytest.MonkeyPatch, said: list[logging.LogRecord]
) -> None:
    put = queue.Queue.put

    def never_wait(self: Any, item: Any, block: bool = True, timeout: float | None = None) -> None:
        assert not block, "the run would wait for its tracker"
        put(self, item, block, timeout)

    monkeypatch.setattr(queue.Queue, "put", never_wait)
    fake.hang.add(where)
    trackers = Trackers([name], run, CONFIG, queue_rows=20)
    trackers.scalars(0, {"loss": 1.0})
    assert fake.hanging.wait(30)
    for step in range(1, 100):
        trackers.scalars(step, {"loss": 1.0})
    assert trackers.open == {} and len(said) == 1 and "does not keep up" in said[0].getMessage()
    trackers.close()
    assert len(said) == 1


@pytest.mark.parametrize("where", ["log", "finish"])
def test_the_end_of_a_run_does_not_wait_for_ever(
    name: str, fake: Fake, run: Run, where: str, said: list[logging.LogRecord]
) -> None:
    fake.hang.add(where)
    trackers = Trackers([name], run, CONFIG, close_seconds=0.05)
    trackers.scalars(0, {"loss": 1.0})
    trackers.close()
    assert len(said) == 1 and "did not finish in time" in said[0].getMessage()


def test_a_talkative_tracker_leaves_stdout_to_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("trackio")
    module.__dict__["run"] = Fake()
    exec("def init(**settings):\n    print('view the dashboard')\n    return run", module.__dict__)
    monkeypatch.setitem(sys.modules, "trackio", module)
    Trackers(["trackio"], run, CONFIG).close()
    assert capsys.readouterr() == ("", "view the dashboard\n")


def test_one_that_fails_takes_no_other_with_it(fake: Fake, name: str, run: Run, said: list[logging.LogRecord]) -> None:
    fake.fail["log"] = ValueError("refused")
    with closing(Trackers(["tensorboard", name], run, CONFIG)) as trackers:
        for step in range(10):
            trackers.scalars(step, {"loss": float(step)})
    assert len(said) == 1 and said[0].getMessage().startswith(name)
    assert read(run)["loss"] == {step: step for step in range(10)}


def read(run: Run) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard_path))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_takes_back_what_a_killed_process_wrote_too_much(run: Run, said: list[logging.LogRecord]) -> None:
    with closing(Trackers(["tensorboard"], run, CONFIG)) as trackers:
        for step in range(1, 11):
            trackers.scalars(step, {"loss": 100.0})
    with closing(Trackers(["tensorboard"], run, CONFIG, resume_step=6)) as trackers:
        for step in range(7, 9):
            trackers.scalars(step, {"loss": 1.0})
        trackers.text(8, "samples", "two\nlines \ud800")
    assert read(run)["loss"] == {**dict.fromkeys(range(1, 7), 100.0), 7: 1.0, 8: 1.0}
    assert said == []


def test_tensorboard_that_cannot_write_is_dropped(run: Run, said: list[logging.LogRecord]) -> None:
    run.tensorboard_path.write_text("a file is in the way")
    with closing(Trackers(["tensorboard"], run, CONFIG)) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    assert len(said) == 1 and said[0].getMessage().startswith("tensorboard is off")


def test_tensorboard_that_is_not_installed(
    run: Run, monkeypatch: pytest.MonkeyPatch, said: list[logging.LogRecord]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Trackers(["tensorboard"], run, CONFIG).close()
    assert len(said) == 1 and "pip install tensorboard" in said[0].getMessage()


def test_an_unknown_tracker_is_named(run: Run) -> None:
    with pytest.raises(BadInput, match="wandb") as error:
        Trackers(["wandbb"], run, CONFIG)
    assert "Did you mean 'wandb'" in str(error.value)


def test_a_name_given_twice_is_opened_once(fake: Fake, name: str, run: Run) -> None:
    Trackers([name, name], run, CONFIG).close()
    assert len(fake.started) == 1


def test_a_run_ends_the_same_without_its_trackers(
    make_run: Any, fake: Fake, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tracker fails at its first row, the other is not installed: the run is that of a run without any."""
    other = {"wandb": "trackio", "trackio": "wandb"}[name]
    monkeypatch.setitem(sys.modules, other, None)
    fake.fail["log"] = ConnectionError("refused")
    watched = make_run("watched", logging={"trackers": ["wandb", "trackio"]}, training={"steps": 6})
    plain = make_run("plain", training={"steps": 6})
    assert fake.started and steps_of(watched) == steps_of(plain) and weights_of(watched) == weights_of(plain)
