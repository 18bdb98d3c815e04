"""Where metrics go besides metrics.jsonl: TensorBoard by default, wandb and trackio by name.

Tracker errors never stop a run; a failing tracker is dropped with one warning. A tracker may be missing, refuse to
start, hang, or lose its network. Each one therefore works in a background thread behind a bounded queue: the training
thread only ever puts rows into the queue, and a tracker that lets it fill up has failed.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import json
import logging
import math
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from smolforge.errors import unknown
from smolforge.files import write_atomically
from smolforge.run import Run

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 20.0
"""How long the end of a run waits for its trackers to send what they still have."""


class Trackers:
    """The trackers of a run, on one rank. No method raises a tracker's error; only `close` waits for one.

    Args:
        names: of the trackers: tensorboard, wandb, trackio.
        config: the resolved configuration; `logging.project` names the project.
        resume_step: the step that the run continues from; TensorBoard hides what was logged after it.
        close_seconds: how long `close` waits for all trackers together.
        queue_rows: rows that wait for a slow tracker before it counts as failed.

    Raises:
        BadInput: an unknown tracker.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: Run,
        config: Mapping[str, Any],
        *,
        resume_step: int | None = None,
        close_seconds: float = CLOSE_SECONDS,
        queue_rows: int = 2000,
    ) -> None:
        known: dict[str, Callable[[], Any]] = {
            "tensorboard": lambda: TensorBoard(run, resume_step),
            "wandb": lambda: HostedTracker("wandb", run, config),
            "trackio": lambda: HostedTracker("trackio", run, config),
        }
        for name in names:
            if name not in known:
                raise unknown("tracker", name, list(known), field="logging.trackers")
        # The trackers that still work.
        self.open = {name: _Background(name, known[name], queue_rows) for name in dict.fromkeys(names)}
        self._close_seconds = close_seconds

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the finite numbers among `values` by name."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        if numbers:
            self._each(lambda tracker: tracker.put((step, numbers)))

    def text(self, step: int, tag: str, text: str) -> None:
        """Send a text, such as a sample, under the name `tag`."""
        self._each(lambda tracker: tracker.put((step, {tag: text})))

    def close(self) -> None:
        """Finish all trackers; a second call does nothing."""
        self._each(lambda tracker: tracker.put(None))
        deadline = time.monotonic() + self._close_seconds
        self._each(lambda tracker: tracker.wait(max(0.0, deadline - time.monotonic())))
        self.open.clear()

    def _each(self, call: Callable[[_Background], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                call(tracker)
            except Exception as error:
                del self.open[name]
                logger.warning(_describe_failure(name, error))


class _Background:
    """A tracker in a thread: opening it, every row and the end of it happen there.

    The thread is a daemon, because a network call that hangs cannot be ended and must not keep the process alive.
    """

    def __init__(self, name: str, make: Callable[[], Any], rows: int) -> None:
        self._rows: queue.Queue[tuple[int, Mapping[str, Any]] | None] = queue.Queue(maxsize=rows)
        self._end: Future[None] = Future()
        threading.Thread(target=self._work, args=(make,), name=f"tracker-{name}", daemon=True).start()

    def put(self, row: tuple[int, Mapping[str, Any]] | None) -> None:
        """Queue (step, values), or None for the end; raise what the tracker failed with."""
        if self._end.done():
            self._end.result()
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            raise TimeoutError(f"it does not keep up; {self._rows.qsize()} rows wait to be sent") from None

    def wait(self, seconds: float) -> None:
        """Wait until everything is sent; raise what the tracker failed with."""
        if not wait([self._end], seconds).done:
            raise TimeoutError(f"it did not finish in time; {self._rows.qsize()} rows were not sent")
        self._end.result()

    def _work(self, make: Callable[[], Any]) -> None:
        try:
            tracker = make()
            while (row := self._rows.get()) is not None:
                tracker.log(*row)
            self._end.set_result(tracker.finish())
        except Exception as error:
            self._end.set_exception(error)
        except BaseException as error:  # some libraries end the process where they cannot start
            self._end.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


class TensorBoard:
    """Event files in RUN/tensorboard, written by torch.utils.tensorboard."""

    def __init__(self, run: Run, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted process wrote after the step that the run continues from.
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(log_dir=str(run.tensorboard_path), purge_step=purge, flush_secs=30)
        self.finish = self._writer.close

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers, and texts as Markdown, where a single newline would be a space."""
        for name, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(name, value.encode("utf-8", "replace").decode().replace("\n", "  \n"), step)
            else:
                self._writer.add_scalar(name, value, step)


class HostedTracker:
    """wandb or trackio, which share an interface: init, log, finish.

    The run's id is kept in RUN/trackers.json, so that a resumed run continues the same one there.
    """

    def __init__(self, library: str, run: Run, config: Mapping[str, Any]) -> None:
        self._library: Any = importlib.import_module(library)
        self._is_wandb = library == "wandb"
        name, identity = run.path.resolve().name or "run", _stable_id(run)
        if self._is_wandb:
            own = {"name": name, "id": identity, "dir": str(run.path), "settings": _wandb_settings(self._library)}
        else:
            _print_on_stderr(library)
            own = {"name": f"{name}-{identity}", "embed": False}
        project = (config.get("logging") or {}).get("project") or "smolforge"
        self._run = self._library.init(project=project, config=dict(config), resume="allow", **own)
        self.finish = self._run.finish

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send numbers and texts."""
        self._run.log({k: self._rich(v) if isinstance(v, str) else v for k, v in values.items()}, step=step)

    def _rich(self, text: str) -> Any:
        if self._is_wandb:
            return self._library.Html(f"<pre style='white-space:pre-wrap'>{html.escape(text)}</pre>")
        # A code block whose fence is longer than any run of backticks in the text.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        markdown = getattr(self._library, "Markdown", str)
        return markdown(f"{fence}\n{text}\n{fence}")


def _wandb_settings(wandb: Any) -> Any:
    for known in ({"finish_timeout": CLOSE_SECONDS}, {}):  # a wandb that does not know a setting refuses it
        with contextlib.suppress(Exception):
            return wandb.Settings(console="off", silent=True, **known)
    return None


def _print_on_stderr(package: str) -> None:
    """Give the modules of a package that prints a `print` on stderr, since stdout belongs to the run's results.

    `contextlib.redirect_stdout` would redirect every thread.
    """
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package and module is not None:
            vars(module)["print"] = partial(print, file=sys.stderr)


def _stable_id(run: Run) -> str:
    path = run.path / "trackers.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(stored, str) and stored.isalnum():
            return stored
    made = uuid.uuid4().hex[:8]
    write_atomically(path, json.dumps({"id": made}) + "\n")
    return made


def _describe_failure(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        fix = "pip install tensorboard" if name == "tensorboard" else "pip install 'smolforge[track]'"
        return f"{name} is off: {error}; install it with {fix}. The run continues; metrics.jsonl has everything."
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{name} is off from now on: {reason}. The run continues; metrics.jsonl has everything."
