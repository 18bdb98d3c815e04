"""What ends a run in the middle loses nothing: bad rows, other errors; and data that changed can be accepted."""

import json
import logging

import pytest
from tiny import steps_of, validations_of, weights_of

from data.conftest import jsonl, named
from data.test_bad_rows import bad_parquet
from smolforge.checkpoint import commit
from smolforge.cli import main
from smolforge.errors import DataError
from smolforge.metrics_log import read_metrics
from smolforge.training.metrics import MetricsLogger


def data_of(path, **keys) -> dict:
    """The section `data` of a run on one file."""
    return {"sources": {str(path): 1.0}, "holdout": 0, **keys}


def test_a_bad_row_in_the_middle_saves_first_and_can_be_left_out(make_run, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="smolforge")
    path = bad_parquet(tmp_path / "a.parquet", 400)
    whole = make_run("whole", data=data_of(path, on_error="skip"))
    with pytest.raises(DataError, match="is not UTF-8"):
        make_run("run", data=data_of(path), checkpoint={"every": 4})
    run = tmp_path / "run"
    done = commit.steps(run / "checkpoints")[-1]
    assert done % 4 and f"step {done} was saved before the error" in caplog.text, "between two regular checkpoints"
    run = make_run("run", data=data_of(path, on_error="skip"))
    assert steps_of(run) == steps_of(whole) and weights_of(run) == weights_of(whole)
    counts = [[row.get("bad_rows") for row in read_metrics(each) if "loss" in row] for each in (run, whole)]
    assert counts[0] == counts[1] and counts[0][0] is None and counts[0][-1] >= 1
    assert "1 row left out so far, such as a.parquet" in caplog.text


def test_any_error_saves_first(make_run, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, logger="smolforge")
    whole = make_run("whole")

    def fail(self, step: int) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLogger, "validate", fail)
        with pytest.raises(ZeroDivisionError):
            make_run("run", evaluation={"every": 7, "tokens": 2000})
    assert commit.steps(tmp_path / "run" / "checkpoints") == [5, 7]
    assert "step 7 was saved before the error" in caplog.text
    run = make_run("run", evaluation={"every": 10, "tokens": 2000})
    assert steps_of(run) == steps_of(whole) and weights_of(run) == weights_of(whole)


def test_half_an_update_is_not_saved(make_run, tmp_path, monkeypatch) -> None:
    from smolforge.training import optim

    updates = []

    def fail(*args: object) -> None:
        updates.append(1)
        if len(updates) == 8:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(optim, "set_learning_rate", fail)
    with pytest.raises(RuntimeError):
        make_run("run")
    assert commit.steps(tmp_path / "run" / "checkpoints") == [5]


def test_one_small_document_is_trained_on_and_validated(make_run, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="smolforge")
    (tmp_path / "a.txt").write_text("\n".join(f"Line {i} of the only document, with a word or two." for i in range(90)))
    data = {"sources": {str(tmp_path / "a.txt"): 1.0}}
    whole = make_run("whole", data=data, training={"steps": 10})
    assert "the end of its only document is held out" in caplog.text
    assert [step for step, _ in validations_of(whole)] == [10]
    make_run("run", data=data, training={"steps": 5})
    run = make_run("run", training={"steps": 10})
    assert [digest for *_, digest in steps_of(run)] == [digest for *_, digest in steps_of(whole)]


def test_a_score_leaves_bad_rows_out_and_says_so(make_run, tmp_path, caplog, capsys) -> None:
    run = make_run("run", training={"steps": 2})
    scores = []
    for name, more in (("good", ""), ("bad", '{"id": 7}\n')):
        path = jsonl(tmp_path / f"{name}.jsonl", named(40))
        path.write_text(path.read_text() + more)
        with pytest.raises(SystemExit) as caught:
            main(["eval", str(run.path), "--data", str(path), "--json"])
        assert not caught.value.code
        scores.append(json.loads(capsys.readouterr().out)["loss"])
    assert scores[0] == scores[1] and "bad.jsonl, line 41 has no column" in caplog.text
