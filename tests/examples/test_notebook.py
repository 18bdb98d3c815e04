"""examples/seed/walkthrough.ipynb: it runs from its first cell to its last, and what is kept of it reads well."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest

from smolforge import config as configuration
from smolforge.metrics_log import read_metrics
from smolforge.run import Run

nbformat = pytest.importorskip("nbformat", reason="the extra dev is not installed")
pytest.importorskip("nbclient", reason="the extra dev is not installed")
pytest.importorskip("matplotlib", reason="the extra dev is not installed")

PATH = Path(__file__).parents[2] / "examples" / "seed" / "walkthrough.ipynb"
# Everything happens, on a model and a run of a twentieth of the size.
SHORT = (
    "--steps 6 --set model.hidden_size=48 --set model.intermediate_size=64 --set model.num_hidden_layers=1 "
    "--set model.vocab_size=512 --set tokenizer.train.vocab_size=512 --set tokenizer.train.documents=200 "
    "--set data.sequence_length=64 --set training.tokens_per_step=128 --set schedule.warmup=2 "
    "--set evaluation.every=40 --set evaluation.tokens=1000 --set samples.every=40 --set samples.max_tokens=8"
)


SHORT_TUNING = "--lr 2e-3 --epochs 0.3 --batch-size 2 --set evaluation.tokens=500 --set samples.max_tokens=4"


def execute(folder: Path, options: str, tuning: str, monkeypatch: pytest.MonkeyPatch):
    """The notebook after all its cells ran in `folder`; a cell that fails fails here."""
    from nbclient import NotebookClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("SMOLFORGE_WALKTHROUGH_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("SMOLFORGE_WALKTHROUGH", options)
    monkeypatch.setenv("SMOLFORGE_WALKTHROUGH_TUNING", tuning)
    # A kernel named python3 may be of another environment; this one's Python runs it.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(PATH, as_version=4)
    NotebookClient(book, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return book


def texts(book) -> str:
    """All that the cells printed."""
    return "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))


def pictures(book) -> list[bytes]:
    """All that the cells drew."""
    found = [output.get("data", {}).get("image/png") for cell in book.cells for output in cell.get("outputs", [])]
    return [base64.b64decode(picture) for picture in found if picture]


def check(book, run: Run, steps: int) -> None:
    """What a reader is promised: both summaries, the run, fifty steps more, two figures, three texts, a chat, the page."""
    said = texts(book)
    assert "Total model parameters: 134,515,008" in said and "Total model parameters: 134,411,328" in said
    done = [row["step"] for row in read_metrics(run) if "loss" in row]
    assert done[-1] == steps + 50 and f"resuming runs/walkthrough from step {steps:,}" in said
    assert len(pictures(book)) == 2 and all(picture.startswith(b"\x89PNG") for picture in pictures(book))
    for prompt in ("Once upon a time", "The future of artificial intelligence", "In the distant galaxy"):
        assert prompt in said
    tuned = [row["validation"]["loss"] for row in read_metrics(Run(f"{run.path}-chat")) if "validation" in row]
    assert "assistant\n⟦" in said and tuned[-1] < tuned[0]
    assert "'completion_tokens': 40" in said and "the server ended with exit code 0" in said
    assert (run.path / "walkthrough.gguf").stat().st_size > 10_000 and run.report_path.exists()


def test_it_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(execute(tmp_path, SHORT, SHORT_TUNING, monkeypatch), Run(tmp_path / "runs" / "walkthrough"), steps=6)


@pytest.mark.slow
def test_it_runs_at_full_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "runs" / "walkthrough")
    book = execute(tmp_path, "", "--lr 2e-3", monkeypatch)
    check(book, run, steps=configuration.build_config("pocket").total_steps)
    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    assert losses[-1] < 2 < 7 < losses[0]


def test_its_outputs_are_kept_and_say_nothing_of_the_machine_they_came_from() -> None:
    book = nbformat.read(PATH, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run in order, all of them"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert len(pictures(book)) == 2 and re.search(r"step ([\d,]+)/\1  loss", texts(book))
    attached = [cell.attachments for cell in book.cells if "attachments" in cell]
    assert len(attached) == 1 and base64.b64decode(attached[0]["page.png"]["image/png"]).startswith(b"\x89PNG")
    whole = json.dumps(book)
    assert not re.search(r"/(home|root|tmp|work|Users)/", whole) and PATH.stat().st_size < 1_500_000
