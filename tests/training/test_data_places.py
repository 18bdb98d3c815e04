"""What counts is what the data is: another spelling or place is accepted, other data refused unless it is accepted."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from tiny import steps_of, undo_after, weights_of

from data.conftest import jsonl, named
from smolforge.cli import main
from smolforge.config import build_config
from smolforge.errors import BadInput
from smolforge.metrics_log import read_metrics
from smolforge.run import Run

TEXTS = named(300, words=40)


@pytest.fixture
def here(tmp_path, monkeypatch, caplog) -> Path:
    """A working directory with documents."""
    caplog.set_level(logging.INFO, logger="smolforge")
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    jsonl(place / "docs.jsonl", TEXTS)
    return place


def digests_of(run: Run) -> list[str]:
    """What each step was fed."""
    return [digest for _, _, digest in steps_of(run)]


def command(*words: str) -> int:
    """The exit status of `smolforge WORDS`."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def data_of(*paths: str) -> dict:
    """The section `data` of a run on these sources."""
    return {"sources": dict.fromkeys(paths, 1.0)}


@pytest.mark.parametrize("spelled", ["./docs.jsonl", "docs*.jsonl", "../h*e/docs.jsonl"])
def test_another_spelling_and_working_directory(make_run, here, spelled) -> None:
    whole = make_run("whole", data=data_of("docs.jsonl"), training={"steps": 8})
    run = make_run("run", data=data_of("docs.jsonl"), training={"steps": 4})
    sources = build_config(str(run.config_path)).data.sources
    assert list(sources) == [str(here / "docs.jsonl")]
    make_run("run", data=data_of(spelled), training={"steps": 6})
    (here / "elsewhere").mkdir()
    os.chdir(here / "elsewhere")
    make_run("run", training={"steps": 8})
    assert digests_of(run) == digests_of(whole)


def test_a_glob_below_a_directory_with_brackets(make_run, here) -> None:
    place = here / "[a]"
    place.mkdir()
    shutil.move(here / "docs.jsonl", place)
    os.chdir(place)
    run = make_run("run", data=data_of("*.jsonl"), training={"steps": 4})
    os.chdir(here)
    make_run("run", training={"steps": 5})
    assert steps_of(run)[-1][0] == 5


def test_a_moved_source_is_named_and_its_new_place_accepted(make_run, here, caplog) -> None:
    run = make_run("run", data=data_of("docs.jsonl"), training={"steps": 4})
    (here / "new").mkdir()
    shutil.move(here / "docs.jsonl", here / "new" / "texts.jsonl")
    with pytest.raises(BadInput, match=r"no such file(.|\n)*--data"):
        make_run("run", training={"steps": 5})
    make_run("run", data=data_of("new/texts.jsonl"), training={"steps": 5})
    assert f"is now read from {here}/new/texts.jsonl" in caplog.text
    make_run("run", training={"steps": 6})
    assert steps_of(run)[-1][0] == 6 and caplog.text.count("is now read from") == 1


def test_two_sources_keep_their_order_and_weights(make_run, here) -> None:
    jsonl(here / "more.jsonl", named(200, "more"))
    data = {"sources": {"docs.jsonl": 0.75, "more.jsonl": 0.25}}
    whole = make_run("whole", data=data, training={"steps": 8})
    run = make_run("run", data=data, training={"steps": 4})
    make_run("run", data={"sources": {"more.jsonl": 0.25, "./docs.jsonl": 0.75}}, training={"steps": 8})
    assert digests_of(run) == digests_of(whole)
    with pytest.raises(BadInput, match="other weights"):
        make_run("run", data={"sources": {"docs.jsonl": 0.5, "more.jsonl": 0.5}}, training={"steps": 9})
    with pytest.raises(BadInput, match="on other data"):
        make_run("run", data=data_of("docs.jsonl"), training={"steps": 9})


def test_changed_data_is_refused_or_accepted_and_recorded(make_run, here, capsys) -> None:
    make_run("run", data=data_of("docs.jsonl"), training={"steps": 10})
    jsonl(here / "docs.jsonl", [*TEXTS[:100], *TEXTS[101:]])
    with pytest.raises(BadInput, match=r"docs.jsonl changed(.|\n)*--accept-changed-data"):
        make_run("run", training={"steps": 14})
    accept = {"accept_changed_data": True}
    run = make_run("run", training={"steps": 14}, request=accept)
    assert [row[0] for row in steps_of(run)] == list(range(1, 15))
    events = [row for row in read_metrics(run) if row.get("event") == "data_changed"]
    assert [event["step"] for event in events] == [10] and "changed" in events[0]["problem"]
    after, weights = steps_of(run), weights_of(run)
    undo_after(run, 10)  # killed before the first save on the new data
    make_run("run", training={"steps": 14})
    assert steps_of(run) == after and weights_of(run) == weights
    assert [row["step"] for row in read_metrics(run) if row.get("event") == "data_changed"] == [10]
    assert [change["step"] for change in json.loads(run.index_path.read_text())["accepted"]] == [10]
    capsys.readouterr()
    assert command("data", "which", str(run.path), "--step", "12") == 0
    assert "docs.jsonl" in capsys.readouterr().out
    assert command("data", "which", str(run.path), "--step", "9") == 2
    assert "changed after step 10" in capsys.readouterr().err


def test_other_data_is_named(make_run, here) -> None:
    make_run("run", data=data_of("docs.jsonl"), training={"steps": 4})
    jsonl(here / "other.jsonl", named(100, "other"))
    with pytest.raises(BadInput, match=r"was started on other data \(.*docs.jsonl\), not .*other.jsonl"):
        make_run("run", data=data_of("other.jsonl"), training={"steps": 5})


def test_a_run_lies_among_its_data(make_run, here) -> None:
    for number, text in enumerate(TEXTS[:60]):
        (here / f"{number}.txt").write_text(text)
    (here / "docs.jsonl").unlink()
    first = make_run("here/runs/first", data=data_of("."), training={"steps": 3})
    run = make_run("here/run", data=data_of("."), training={"steps": 3})
    make_run("here/run", training={"steps": 5})
    make_run("here/run", data=data_of("."), training={"steps": 6})
    assert steps_of(run)[-1][0] == 6
    indexes = [json.loads(each.index_path.read_text()) for each in (first, run)]
    assert indexes[0]["hash"] == indexes[1]["hash"] and len(indexes[0]["sources"][0]["shards"]) == 60
    again = make_run("again", data=data_of("**/*.txt", "**/samples.jsonl"), training={"steps": 2})
    assert [s["file"] for s in json.loads(again.index_path.read_text())["sources"][1]["shards"]], "named on purpose"


def test_the_cache_lies_where_the_environment_says(make_run, here, monkeypatch) -> None:
    import gzip

    (here / "a.jsonl.gz").write_bytes(gzip.compress((here / "docs.jsonl").read_bytes()))
    monkeypatch.setenv("SMOLFORGE_CACHE", str(here / "scratch"))
    run = make_run("run", data=data_of("a.jsonl.gz"), training={"steps": 2})
    assert list((here / "scratch" / "data").iterdir()) and not (run.path / "cache").exists()


def test_a_tokenizer_and_a_first_model_by_another_spelling(make_run, here) -> None:
    make_run("here/first", data=data_of("docs.jsonl"), training={"steps": 2})
    sections = {"tokenizer": "first/tokenizer", "data": data_of("docs.jsonl")}
    run = make_run("run", training={"steps": 2}, **sections)
    make_run("run", training={"steps": 3}, **{**sections, "tokenizer": "./first/tokenizer"})
    assert steps_of(run)[-1][0] == 3
    run = make_run("grown", init="first", training={"steps": 2}, data=data_of("docs.jsonl"))
    os.chdir(here.parent)
    make_run("grown", init="here/first", training={"steps": 3})
    assert steps_of(run)[-1][0] == 3
