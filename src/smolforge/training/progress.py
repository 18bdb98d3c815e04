"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any


class Console:
    """Says things, and keeps a live line under them while a run goes on."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.quiet = quiet
        # In a notebook rich would make a cell's output of every line, instead of text that is selected as one.
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)
        self.live: Any = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """Print one line; it scrolls up above the live line."""
        if not self.quiet:
            self.rich.print(text, markup=False)

    def start(self, total: int, done: int) -> None:
        """Begin the live line of a run of `total` steps."""
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.live = Progress(
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self.rich,
            transient=True,
        )
        self.live.start()
        self._task = self.live.add_task("", total=total, completed=done, figures="starting")

    def advance(self, step: int) -> None:
        if self.live:
            self.live.update(self._task, completed=step)

    def figures(self, row: dict[str, Any], total: int, seconds_left: float) -> None:
        """Show the figures of a logged step."""
        parts = [
            f"loss {_number(row['loss'], '.4f')}",
            f"lr {row['lr']:.2e}",
            f"{row['tokens_per_second']:,.0f} tok/s" if row["tokens_per_second"] else "",
            f"{row['memory_bytes'] / 2**30:.1f} GiB",
            f"ETA {clock(seconds_left)}" if seconds_left else "",
        ]
        if row.get("mfu") is not None:
            parts.insert(3, f"MFU {row['mfu']:.0%}")
        text = "  ".join(part for part in parts if part)
        if self.live:
            self.live.update(self._task, completed=row["step"], figures=text)
        else:
            self.say(f"step {row['step']:,}/{total:,}  {text}")

    def stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None


class Throughput:
    """Tokens per second over the last steps, and what is left at that pace."""

    def __init__(self, tokens_per_step: int, window: int = 20) -> None:
        self.tokens_per_step, self.window = tokens_per_step, window
        self.times: list[float] = []  # the first step is not counted: it compiles, and waits for the first data

    def tick(self) -> None:
        self.times = [*self.times[-self.window :], time.perf_counter()]

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training, such as an evaluation."""
        self.times = [t + seconds for t in self.times]

    @property
    def seconds_per_step(self) -> float:
        steps = len(self.times) - 1
        return (self.times[-1] - self.times[0]) / steps if steps > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds_per_step if self.seconds_per_step else 0.0


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    whole = round(max(0.0, seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _number(value: Any, spec: str) -> str:
    return "not finite" if value is None else format(value, spec)
