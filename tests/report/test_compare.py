"""Runs beside each other: as text, as data and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import make_run
from test_report import check_page

from smolforge.errors import BadInput
from smolforge.report import compare, comparison, write_comparison


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("compared")
    return [
        make_run(folder / "wsd", rows=120, seed=1),
        make_run(folder / "cosine", rows=60, total=120, seed=2, lr=1e-3, overrides=["schedule.name=cosine"]),
    ]


def test_the_table_has_the_numbers_and_only_the_keys_that_differ(runs: list[Path]) -> None:
    table = compare(runs, width=100)
    lines = {line.split("│")[0].strip(): line for line in table.splitlines()}
    assert "wsd" in table.splitlines()[0] and "cosine" in table.splitlines()[0]
    assert "0.003" in lines["optimizer.lr"] and "0.001" in lines["optimizer.lr"]
    assert "cosine" in lines["schedule.name"] and "model.hidden_size" not in lines
    assert "3,148,224" in lines["parameters"] and "done" in lines["state"] and "not done" in lines["state"]
    first, second = (summary.bits_per_byte for summary in comparison(runs).summaries)
    assert first < second and f"{first:.3f} *" in lines["held-out bits per byte"]
    assert max(map(len, table.splitlines())) <= 100


def test_the_numbers_are_json(runs: list[Path]) -> None:
    tree = json.loads(json.dumps(comparison(runs).as_dict()))
    assert [run["steps"] for run in tree["runs"]] == [120, 60]
    assert tree["differences"]["optimizer.lr"] == {"wsd": "0.003", "cosine": "0.001"}


def test_the_page_lays_the_curves_over_each_other(runs: list[Path], tmp_path: Path) -> None:
    page = check_page(write_comparison(runs, tmp_path / "pages" / "both.html"))
    assert "wsd predicts held-out text best" in page.text
    assert page.charts is not None and len(page.charts["charts"]) == 6
    for chart in page.charts["charts"]:
        assert [(series["label"], series["colour"]) for series in chart["series"]] == [("wsd", 1), ("cosine", 2)]
    assert (len(page.column("Loss against time", 0)), len(page.column("Loss against time", 1))) == (120, 60)
    assert "optimizer.lr" in page.text and "hidden_size" not in page.text


def test_one_run_and_two_equal_ones(runs: list[Path], tmp_path: Path) -> None:
    assert "wsd" in compare(runs[:1])
    table = compare([runs[0], runs[0]])
    assert "the configurations are the same" in table and "*" not in table
    assert "every key is the same" in check_page(write_comparison([runs[0], runs[0]], tmp_path / "same.html")).text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    same = [make_run(tmp_path / folder / "run", rows=3) for folder in ("a", "b")]
    assert comparison(same).names == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("override", "incomparable"),
    [
        ("data.sources={other.txt: 1}", ("held-out bits per byte", "held-out loss", "training loss")),
        ("data.holdout=0.2", ("held-out bits per byte", "held-out loss")),
        ("evaluation.tokens=1000", ("held-out bits per byte", "held-out loss")),
        ("tokenizer=elsewhere", ("held-out loss", "training loss")),
    ],
)
def test_scores_on_different_texts_or_tokens_have_no_winner(
    runs: list[Path], tmp_path: Path, override: str, incomparable: tuple[str, ...]
) -> None:
    other = make_run(tmp_path / "other", rows=60, seed=3, overrides=[override])
    lines = {line.split("│")[0].strip(): line for line in compare([runs[0], other]).splitlines()}
    for label in incomparable:
        assert "*" not in lines[label], label
    told = "held-out texts differ" in compare([runs[0], other])
    assert told is ("held-out bits per byte" in incomparable)
    assert ("*" in lines["held-out bits per byte"]) is not told
    assert comparison([runs[0], other]).as_dict()["same_held_out_text"] is not told
    page = check_page(write_comparison([runs[0], other], tmp_path / "page.html"))
    assert ("predicts held-out text best" in page.text) is not told


def test_the_same_text_at_another_place_is_the_same(tmp_path: Path) -> None:
    paths = []
    for number, content in enumerate(["one", "one", "two"]):
        path = make_run(
            tmp_path / str(number), rows=9, seed=number, overrides=[f"data.sources={{place{number}.txt: 1}}"]
        )
        (path / "data_index.json").write_text(json.dumps({"version": 1, "hash": content}))
        paths.append(path)
    assert comparison(paths[:2]).same_text and not comparison(paths[1:]).same_text


def test_a_run_that_has_nothing_yet_stands_beside_one_that_has(runs: list[Path], tmp_path: Path) -> None:
    assert "–" in compare([runs[0], tmp_path])
    check_page(write_comparison([runs[0], tmp_path], tmp_path / "page.html"))


def test_a_hostile_run_cannot_move_the_cursor(tmp_path: Path, runs: list[Path]) -> None:
    run = make_run(tmp_path / "[red]\x1b[2J<b>", rows=3)
    (run / "config.yaml").write_text('model: {x: "\\e[31m</td><script>"}\n')
    assert "\x1b" not in compare([run, runs[0]])
    assert "[red]" in compare([run, runs[0]])
    check_page(write_comparison([run, runs[0]], tmp_path / "page.html"))


def test_many_runs_make_one_page_of_the_same_size(runs: list[Path], tmp_path: Path) -> None:
    check_page(write_comparison(runs * 16, tmp_path / "page.html"))


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="0 runs"):
        compare([])
    with pytest.raises(BadInput, match="no run at"):
        compare([tmp_path / "nowhere"])
