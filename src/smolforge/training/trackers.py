"""Where numbers go besides metrics.jsonl: TensorBoard always, wandb and trackio by name.

A tracker is a guest. It may be missing, refuse to start, hang, or lose its network; the run neither stops nor waits
for it. Each failure is said once, and the tracker is dropped; metrics.jsonl has everything anyway.

TensorBoard writes a local file and is called directly. The others talk to a network, so each lives in a background
thread behind a bounded queue: the training thread only ever puts a row into the queue, and a tracker that lets it
fill up has failed. What such a thread has to say is kept and said by the training thread, which owns the terminal.
"""

from __future__ import annotations

import html
import importlib
import json
import math
import queue
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from smolforge.errors import unknown
from smolforge.files import write_atomically
from smolforge.run import Run

QUEUE_ROWS = 2000
"""Rows that wait for a slow tracker before it counts as failed."""
CLOSE_SECONDS = 20.0
"""How long the end of a run waits for a tracker to send what it still has."""

_STOP = object()


class Trackers:
    """All trackers of a run. No method raises, and none waits for a network.

    A context manager; `close` at the end waits for the slow ones, for `CLOSE_SECONDS` in all.
    """

    def __init__(self, say: Callable[[str], None], close_seconds: float = CLOSE_SECONDS) -> None:
        self._say = say
        self._close_seconds = close_seconds
        self._open: dict[str, _Tracker] = {}

    @property
    def names(self) -> list[str]:
        """The trackers that still work."""
        return list(self._open)

    def add(self, name: str, make: Callable[[], _Tracker]) -> None:
        """Open one more tracker; a failure is said."""
        try:
            self._open[name] = make()
        except Exception as error:
            self._say(_failure(name, error))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the finite numbers among `values`, by name, as those of `step`."""
        kept = {name: float(value) for name, value in values.items() if _is_number(value)}
        if kept:
            self._each(lambda tracker: tracker.scalars(step, kept))

    def text(self, step: int, tag: str, text: str) -> None:
        """Send a text, such as a sample, under the name `tag`."""
        self._each(lambda tracker: tracker.text(step, tag, text))

    def close(self) -> None:
        """Finish all trackers; a second call does nothing."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker, lambda tracker: tracker.finish())
        deadline = time.monotonic() + self._close_seconds
        for name, tracker in list(self._open.items()):
            self._try(name, tracker, lambda tracker: tracker.wait(max(0.0, deadline - time.monotonic())))
        self._open.clear()

    def _each(self, send: Callable[[_Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker, send)

    def _try(self, name: str, tracker: _Tracker, send: Callable[[_Tracker], None]) -> None:
        try:
            send(tracker)
        except Exception as error:  # whatever a guest throws, the run goes on
            self._open.pop(name, None)
            self._say(_failure(name, error))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_trackers(
    names: Sequence[str],
    run: Run,
    config_dict: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    resume_step: int | None = None,
    close_seconds: float = CLOSE_SECONDS,
    queue_rows: int = QUEUE_ROWS,
) -> Trackers:
    """Open the trackers `names` (tensorboard, wandb, trackio) for one run, on one rank.

    Args:
        config_dict: the resolved configuration; `logging.project` names the project.
        say: where a failure is told, once per tracker, in the calling thread.
        resume_step: the step that the run goes on from; what was tracked after it is taken back where possible.
        close_seconds: how long `close` waits for the trackers in the background, in all.
        queue_rows: rows that may wait for a tracker in the background.

    Raises:
        BadInput: a name that is no tracker's.
    """
    trackers = Trackers(say, close_seconds)
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            trackers.add(name, lambda: TensorBoard(run, resume_step))
        elif name in _REMOTE:
            trackers.add(name, lambda kind=_REMOTE[name]: _Background(lambda: kind(run, dict(config_dict)), queue_rows))
        else:
            raise unknown("tracker", name, ["tensorboard", *_REMOTE], field="logging.trackers")
    return trackers


class _Tracker(ABC):
    """What a run asks of a tracker. Any method may raise; it is then the last one called."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def text(self, step: int, tag: str, text: str) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """No more rows will come."""

    def wait(self, seconds: float) -> None:
        """Until everything is sent, but no longer than `seconds`; raises where it is not."""
        del seconds


class TensorBoard(_Tracker):
    """Event files in RUN/tensorboard, written by torch.utils.tensorboard."""

    def __init__(self, run: Run, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted process wrote after the step that the run goes on from.
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(log_dir=str(run.tensorboard_path), purge_step=purge, flush_secs=30)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, tag: str, text: str) -> None:
        # TensorBoard reads text as Markdown, where a single newline is a space.
        self._writer.add_text(tag, text.encode("utf-8", "replace").decode().replace("\n", "  \n"), step)

    def finish(self) -> None:
        self._writer.close()


class Wandb(_Tracker):
    """Weights & Biases. The run keeps its id in RUN, so that resuming goes on in the same one."""

    def __init__(self, run: Run, config: dict[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._html = wandb.Html
        self._run = wandb.init(
            project=_project(config),
            name=_name(run),
            id=_kept_id(run),
            resume="allow",
            dir=str(run.path),
            config=config,
            settings=_quiet_settings(wandb),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: self._html(f"<pre style='white-space:pre-wrap'>{html.escape(text)}</pre>")}, step=step)

    def finish(self) -> None:
        self._run.finish()


class Trackio(_Tracker):
    """Trackio: local, or a Space where TRACKIO_SPACE_ID names one."""

    def __init__(self, run: Run, config: dict[str, Any]) -> None:
        trackio: Any = importlib.import_module("trackio")
        _speak_on_stderr("trackio")
        self._markdown = getattr(trackio, "Markdown", None)
        name = f"{_name(run)}-{_kept_id(run)}"
        self._run = trackio.init(project=_project(config), name=name, config=config, resume="allow", embed=False)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        # A code block with a fence longer than any in the text, so that the text stays text.
        fence = "`" * max(3, 1 + _longest_run(text, "`"))
        shown = f"{fence}\n{text}\n{fence}"
        self._run.log({tag: self._markdown(shown) if self._markdown else text}, step=step)

    def finish(self) -> None:
        self._run.finish()


_REMOTE: dict[str, Callable[[Run, dict[str, Any]], _Tracker]] = {"wandb": Wandb, "trackio": Trackio}


class _Background(_Tracker):
    """A tracker in a thread of its own: import, start and every row happen there.

    The thread is a daemon, since one that hangs in a network call cannot be ended and must not keep the process.
    """

    def __init__(self, make: Callable[[], _Tracker], rows: int) -> None:
        self._rows: queue.Queue[Any] = queue.Queue(maxsize=rows)
        self._error: BaseException | None = None
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make,), name="smolforge-tracker", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._put(lambda tracker: tracker.scalars(step, values))

    def text(self, step: int, tag: str, text: str) -> None:
        self._put(lambda tracker: tracker.text(step, tag, text))

    def finish(self) -> None:
        self._put(_STOP)

    def wait(self, seconds: float) -> None:
        if not self._finished.wait(seconds):
            raise TimeoutError(f"it did not finish in time; {self._rows.qsize()} rows were not sent")
        self._check()

    def _put(self, row: Any) -> None:
        self._check()
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            raise TimeoutError(f"it does not keep up; {self._rows.qsize()} rows wait to be sent") from None

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self, make: Callable[[], _Tracker]) -> None:
        try:
            tracker = make()
            while (send := self._rows.get()) is not _STOP:
                send(tracker)
            tracker.finish()
        except BaseException as error:  # SystemExit too: some libraries end the process where they cannot start
            self._error = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
        finally:
            self._finished.set()


def _failure(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        fix = "pip install tensorboard" if name == "tensorboard" else "pip install 'smolforge[track]'"
        return f"{name} is off: {error}; install it with {fix}. The run goes on, metrics.jsonl has everything."
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{name} is off from here: {reason}. The run goes on, metrics.jsonl has everything."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _longest_run(text: str, character: str) -> int:
    longest = current = 0
    for found in text:
        current = current + 1 if found == character else 0
        longest = max(longest, current)
    return longest


def _project(config: Mapping[str, Any]) -> str:
    logging = config.get("logging")
    return str(logging.get("project") or "smolforge") if isinstance(logging, Mapping) else "smolforge"


def _name(run: Run) -> str:
    return run.path.resolve().name or "run"


def _kept_id(run: Run) -> str:
    """A name for this run that no other has, made once and kept in RUN/trackers.json."""
    path = run.path / "trackers.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(kept, str) and kept.isalnum():
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        pass
    made = uuid.uuid4().hex[:8]
    write_atomically(path, json.dumps({"id": made}) + "\n")
    return made


def _speak_on_stderr(package: str) -> None:
    """Let a package that prints on stdout, where a run's own results go, print on stderr.

    In its own modules only: `contextlib.redirect_stdout` would move the words of every thread.
    """
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package and module is not None:
            vars(module)["print"] = partial(print, file=sys.stderr)


def _quiet_settings(wandb: Any) -> Any:
    """Settings under which wandb leaves the terminal alone and gives up at the end; fewer where it knows fewer."""
    for wanted in (
        {"console": "off", "silent": True, "finish_timeout": CLOSE_SECONDS},
        {"console": "off", "silent": True},
    ):
        try:
            return wandb.Settings(**wanted)
        except Exception:  # a setting that this wandb does not know is refused with an error of its own
            continue
    return None
