"""Append-only logs of a run: metrics.jsonl and samples.jsonl.

A row is one `write`, so a killed process can tear only the last line, and opening the log cuts a torn line off. A
resumed run removes the rows after the step it continues from.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from smolforge.files import no_room, read_json_lines, write_atomically
from smolforge.run import Run


class MetricsLog:
    """An append-only file of JSON rows. Non-finite floats are written as null, since JSON has no word for them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._descriptor, path.read_bytes().rfind(b"\n") + 1)  # without a torn last line

    def append(self, row: dict[str, Any]) -> None:
        """Write one row.

        Raises:
            RunFailed: no room on the disk; the rows before are whole.
        """
        line = (json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
        before = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):  # a nearly full disk takes a part first and fails at the next write
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise no_room(error, self.path, len(line)) from None

    def truncate_after(self, step: int) -> int:
        """Take back all rows of later steps than `step`; the number of rows removed. Atomic."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            write_atomically(self.path, b"".join(kept))
            os.close(self._descriptor)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _step_of(line: bytes) -> float:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf  # torn by a power cut: it goes with the later rows
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else -1


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def read_metrics(run: Run | str | Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl: training, validation and events, in the order written."""
    return list(read_json_lines((run if isinstance(run, Run) else Run(run)).metrics_path))
