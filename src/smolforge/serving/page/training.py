"""The training tab: curves and samples of a running or finished run, from its files.

The log is read from where the last reading ended. Each curve keeps at most `POINTS` points: when it has more,
every other one goes, so a run of a million steps costs no more than a short one.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import yaml
from fastapi import APIRouter

from smolforge.config import RunConfig
from smolforge.run import Run
from smolforge.serving.state import Service

POINTS = 1500
CURVES = ("loss", "lr", "tokens_per_second", "grad_norm")
LIVE_SECONDS = 60.0  # a log written to this recently belongs to a run that goes on
MOST_SAMPLES = 60


class Curve:
    """(step, value) pairs, thinned evenly as they become many."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self._stride, self._seen = 1, 0

    def add(self, step: int, value: float) -> None:
        """Take the next pair."""
        if self._seen % self._stride == 0:
            self.points.append((step, value))
            if len(self.points) > POINTS:
                self.points = self.points[::2]
                self._stride *= 2
        self._seen += 1


class Tail:
    """The whole rows that a growing file of JSON lines has gained since the last look.

    A file that was replaced or cut (a resumed run takes rows back) is read again from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether it begins anew, the rows)."""
        try:
            file = self.path.open("rb")
        except OSError:
            return False, []
        with file:
            status = os.fstat(file.fileno())
            identity = status.st_dev, status.st_ino
            anew = identity != self._identity or status.st_size < self._offset
            if anew:
                self._identity, self._offset = identity, 0
            file.seek(self._offset)
            data = file.read(64 << 20)
        end = data.rfind(b"\n") + 1
        self._offset += end
        rows = []
        for line in data[:end].splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return anew, rows


class TrainingView:
    """What the tab shows of one run; `read` catches up with its files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._metrics, self._samples = Tail(run.metrics_path), Tail(run.samples_path)
        self._clear()
        self._told: list[dict[str, Any]] = []

    def _clear(self) -> None:
        self.curves = {name: Curve() for name in (*CURVES, "validation")}
        self.last: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.entropy: float | None = None

    def read(self) -> dict[str, Any]:
        """Everything, as the page's script wants it."""
        anew, rows = self._metrics.read()
        if anew:
            self._clear()
        for row in rows:
            self._take(row)
        anew, told = self._samples.read()
        self._told = [*([] if anew else self._told), *told][-MOST_SAMPLES:]
        return {
            "run": self.run.path.name,
            "curves": {name: curve.points for name, curve in self.curves.items() if curve.points},
            "last": self.last,
            "total": self._total(),
            "live": self._live(),
            "events": self.events[-20:],
            "samples": [
                {"step": r["step"], "prompt": str(r.get("prompt", "")), "text": str(r.get("text", ""))}
                for r in self._told
            ],
        }  # fmt: skip

    def _take(self, row: dict[str, Any]) -> None:
        step, validation = row["step"], row.get("validation")
        if isinstance(validation, dict):
            if isinstance(validation.get("loss"), (int, float)):
                self.curves["validation"].add(step, validation["loss"])
                self.last["validation"] = validation["loss"]
            return
        if "event" in row:
            self.events.append({"step": step, "event": str(row["event"])})
            return
        for name in CURVES:
            if isinstance(row.get(name), (int, float)):
                self.curves[name].add(step, row[name])
        self.last.update({k: row[k] for k in ("step", "tokens", *CURVES) if isinstance(row.get(k), (int, float))})

    def _live(self) -> bool:
        try:
            return time.time() - self.run.metrics_path.stat().st_mtime < LIVE_SECONDS
        except OSError:
            return False

    def _total(self) -> int | None:
        try:
            config = yaml.safe_load(self.run.config_path.read_text(encoding="utf-8"))
            return RunConfig.model_validate(config).total_steps if config.get("training") else None
        except (OSError, ValueError, yaml.YAMLError, AttributeError):
            return None


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(include_in_schema=False)
    view = TrainingView(service.source.run) if service.source.run else None
    turn = asyncio.Lock()

    @routes.get("/page/run")
    async def run() -> dict[str, Any]:
        if view is None:
            return {"run": None}
        async with turn:
            return await asyncio.to_thread(view.read)

    return routes
