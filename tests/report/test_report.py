"""The page of a run: complete, self-contained, small, and safe whatever the run wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import make_run

import smolforge.report
from smolforge.errors import BadInput
from smolforge.report import read_history, summarize, write_report
from smolforge.report.history import TRAINING
from smolforge.report.page import MAX_CARDS, charts, select_samples

TWO_MB = 2_000_000
_HTML = "html head meta link title style body main header footer section article p b i h1 h2 h3 div span dl dt dd ul li"
_CHARTS = "figure figcaption button input label noscript details summary caption"
_TAGS = set(f"{_HTML} {_CHARTS} pre table thead tbody tr th td script".split())
_STATIC = Path(smolforge.report.__file__).parent / "static"
_VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page, and whether its elements close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.charts: dict[str, Any] | None = None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.tags[-1][1].get("type") == "application/json":
                self.charts = json.loads(data)
            else:
                self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.words.append(f" {data}" if self.open and self.open[-1] in ("td", "th") else data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def column(self, title: str, place: int, x: bool = False) -> list[float | None]:
        """The values of a series of the chart with this title."""
        assert self.charts
        chart = next(chart for chart in self.charts["charts"] if chart["title"] == title)
        series = chart["series"][place]
        return self.charts["tables"][series["table"]][chart["x"] if x else series["column"]]


def check_page(path: Path) -> Page:
    """What holds for every page: parses, is small, reaches for nothing outside, runs only its own script."""
    page = Page(path)
    assert len(page.source.encode()) < TWO_MB
    for tag, attributes in page.tags:
        assert tag in _TAGS
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "action", "xlink:href")
            assert name != "href" or value == "data:,"
    library = (_STATIC / "uPlot.iife.min.js").read_text(encoding="utf-8")
    assert len(page.scripts) == 2 and page.scripts[0] == library
    rest = page.source.replace(library, "")
    assert "http://" not in rest and "https://" not in rest
    assert "url(" not in rest and "@import" not in rest
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy
    for script in page.scripts:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    drawn = [a["aria-label"] for tag, a in page.tags if a.get("role") == "img"]
    assert [label.partition(" against ")[0] for label in drawn if label] == [
        chart["title"].partition(" against ")[0] for chart in (page.charts or {"charts": []})["charts"]
    ], "each chart has words for who cannot see it"
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tale", rows=640)


def test_a_page_tells_everything_of_a_run(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = check_page(path)
    assert "A 3.15M-parameter Llama model learned from 2.62M tokens of tales" in page.text
    summary = summarize(read_history(run))
    assert summary.finished and summary.parameters == 3_148_224 and summary.resumes == 1
    assert f"{100 * (summary.bits_per_byte / 0.905 - 1):.1f}% above the 0.9050 of the source itself" in page.text
    for title in ("Loss", "Held-out bits per byte", "Loss against time", "Learning rate", "Gradient norm", "Throughput",
                  "Memory", "Waiting for data"):  # fmt: skip
        assert any((a.get("aria-label") or "").startswith(f"{title} against") for tag, a in page.tags), title
    labels = [a.get("aria-label") or "" for _, a in page.tags]
    assert any("the source's own entropy at 0.9050" in label for label in labels)
    for words in ("Once upon a time", "The future of artificial intelligence", "In the distant galaxy",
                  "num_key_value_heads", "micro-batch 16 sequences", "2.13.0+cpu", "skip", "not finite"):  # fmt: skip
        assert words in page.text, words
    assert "smolforge train" in page.text and "--out NEW" in page.text
    assert not list(run.glob(".*")), "a temporary file was left"


def test_the_charts_hold_what_the_log_holds(run: Path) -> None:
    page = check_page(write_report(run))
    rows = {row["step"]: row for line in (run / "metrics.jsonl").open() if "loss" in (row := json.loads(line))}
    assert page.charts is not None and page.charts["tables"][0]["step"] == sorted(rows)
    assert page.column("Loss", 0, x=True) == [row["tokens"] for row in rows.values()]
    assert page.column("Loss", 0) == pytest.approx([row["loss"] for row in rows.values()], rel=1e-4)
    assert page.column("Gradient norm", 0) == pytest.approx([row["grad_norm"] for row in rows.values()], rel=1e-4)
    assert len(page.column("Loss", 2)) == len(page.column("Held-out bits per byte", 0)) == 12
    assert [mark["label"] for mark in page.charts["marks"]] == ["skip at step 213", "resume at step 320"]
    assert page.charts["marks"][1]["tokens"] == 320 * 4096


def test_the_numbers_are_a_table_too(run: Path) -> None:
    page = check_page(write_report(run))
    last = [json.loads(line) for line in (run / "metrics.jsonl").open() if "validation" in line][-1]["validation"]
    assert any(tag == "noscript" for tag, _ in page.tags)
    words = page.text.partition("held-out values are of the last validation")[2].partition("Samples")[0]
    assert "learning rate gradient norm" in words and "640 2.621M 1 min 29 s" in words
    assert f"{last['loss']:.3f} {last['bits_per_byte']:.3f}" in words


HOSTILE = (
    "</pre></p></script><script>alert(1)</script><img src=x onerror=\"alert(2)\"> \"' onmouseover='x' &lt;b&gt; "
    "{{ 7*7 }} \x00\x1b[31m \ud800 \u202e]]> --> <!-- <svg/onload=alert(3)>"
)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<script>alert(1)<", rows=30)
    config = (run / "config.yaml").read_text() + f"{json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}\n"
    (run / "config.yaml").write_text(config)
    sample = {"step": 30, "prompt": HOSTILE, "text": HOSTILE, "finish_reason": HOSTILE, "seed": HOSTILE}
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "event": HOSTILE, HOSTILE: HOSTILE}) + "\n")
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "decisions": [HOSTILE, {HOSTILE: [HOSTILE]}]}))
    page = check_page(write_report(run))
    assert "<script>alert(1)<" in page.text  # the title, as words
    assert page.text.count('<img src=x onerror="alert(2)">') >= 7
    assert "{{ 7*7 }}" in page.text and "\x1b" not in page.source and "\x00" not in page.source


def test_a_run_that_has_logged_nothing(tmp_path: Path) -> None:
    page = check_page(write_report(tmp_path))
    assert "no step is logged yet" in page.text and page.charts is None
    make_run(tmp_path / "set-up", rows=0, total=10)
    assert "no step is logged yet" in check_page(write_report(tmp_path / "set-up")).text


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no run at"):
        write_report(tmp_path / "nowhere")


def test_one_row_is_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 4096, "loss": 8.3, "lr": 0.001, "time": 5}\n')
    page = check_page(write_report(tmp_path))
    assert "8.300" in page.text and page.charts


def test_a_run_under_way_says_how_far_it_is(tmp_path: Path) -> None:
    page = check_page(write_report(make_run(tmp_path / "run", rows=30, total=120)))
    assert "has learned from 123k tokens of tales so far" in page.text and "(step 30 of 120, 25%)" in page.text
    assert any(a.get("aria-valuenow") == "25" for _, a in page.tags)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("small") / "run", rows=12)
    (run / "config.yaml").unlink()
    return run


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1))
def test_a_page_can_be_written_at_any_byte_of_a_run(small: Path, share: float, tmp_path_factory) -> None:
    run = tmp_path_factory.mktemp("torn")
    for name in ("metrics.jsonl", "samples.jsonl", "environment.json"):
        data = (small / name).read_bytes()
        (run / name).write_bytes(data[: round(share * len(data))])
    whole = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
    steps = [row["step"] for row in whole if "event" not in row]
    check_page(write_report(run))
    assert summarize(read_history(run)).steps == max(steps, default=None)


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([1e308, -1e308, 10**400])
)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)
_NAMES = (*TRAINING, "time", "event", "validation", "entropy_bits_per_byte", "prompt", "text")
_ROW = st.dictionaries(st.sampled_from(_NAMES), _VALUES | st.integers(0, 100) | st.floats(0, 100), max_size=9)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(_ROW, max_size=12), tree=_VALUES)
def test_no_row_whatever_stops_the_page(rows: list[dict], tree: object, tmp_path_factory) -> None:
    run = tmp_path_factory.mktemp("fuzz")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines)
    (run / "samples.jsonl").write_text(lines)
    (run / "config.yaml").write_text(json.dumps({"model": tree, "data": tree, "training": tree, "x": tree}))
    (run / "environment.json").write_text(json.dumps({"decisions": tree, "device": tree}))
    check_page(write_report(run))


def test_running_time_leaves_out_the_time_in_which_nothing_ran(run: Path) -> None:
    history = read_history(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    times = [row["time"] for row in rows if "loss" in row]
    assert times[-1] - times[0] > 7200
    first = rows[0]["tokens"] / rows[0]["tokens_per_second"]
    assert history.training["seconds"][0] == pytest.approx(first)
    assert history.training["seconds"][-1] == pytest.approx(times[-1] - times[0] - 7200 + first, abs=5)
    assert (np.diff(history.training["seconds"]) >= 0).all()


def test_a_step_that_was_repeated_counts_once(tmp_path: Path) -> None:
    rows = [
        {"step": step, "tokens": step * 10, "loss": loss} for step, loss in [(1, 9), (2, 8), (3, 7), (2, 5), (3, 4)]
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = read_history(tmp_path).training
    assert training["step"].tolist() == [1, 2, 3] and training["loss"].tolist() == [9, 5, 4]


def test_waiting_for_data_is_a_share_of_the_time(tmp_path: Path) -> None:
    rows = [{"step": s, "tokens": 1000 * s, "loss": 1, "tokens_per_second": 500, "data_seconds": 0.5, "time": 2.0 * s}
            for s in range(1, 9)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summarize(read_history(tmp_path)).data_wait == pytest.approx(0.25)


def test_rows_without_a_number_leave_a_gap_not_a_zero(tmp_path: Path) -> None:
    rows = [{"step": s, "tokens": s, "loss": None if s == 5 else 2.0} for s in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = read_history(tmp_path)
    assert np.isnan(history.training["loss"]).tolist() == [s == 5 for s in range(1, 11)]
    assert summarize(history).loss == 2.0
    check_page(write_report(tmp_path))


def test_the_command_survives_a_shell(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run; rm -rf 'x'", rows=3)
    page = check_page(write_report(run))
    command = re.search(r"smolforge train .*? --out NEW", page.text)
    assert command and shlex.split(command[0])[2] == str(run / "config.yaml")


def write_long(run: Path, rows: int) -> None:
    """A log of `rows` steps with one spike, written fast."""
    run.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, rows)
    noise[rows // 2] = 50
    line = (
        '{"step": %d, "tokens": %d, "loss": %.6f, "lr": 0.001, "grad_norm": %.6f, "tokens_per_second": %.3f, '
        '"mfu": 0.41, "memory_bytes": 123456789, "data_seconds": 0.1, "data_digest": "0123", "time": %.2f}\n'
    )
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(
            line % (i + 1, (i + 1) * 65536, 2.5 + noise[i], 1 + abs(noise[i]), 3e5, 1.7e9 + i / 4) for i in range(rows)
        )
        file.writelines(
            f'{{"step": {i * rows // 500}, "tokens": {i * rows // 500 * 65536}, "validation": {{"loss": 2.5, '
            f'"bits_per_byte": 1.1}}, "time": {1.7e9 + i * rows / 2000}}}\n'
            for i in range(1, 501)
        )
        file.writelines(f'{{"step": {rows}, "event": "skip", "reason": "batch {i}"}}\n' for i in range(2000))
    with (run / "samples.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"step": i, "prompt": f"p{i % 20}", "text": "<&\u00e9" * 2000}) + "\n" for i in range(200)
        )


def check_long(run: Path, rows: int) -> None:
    page = check_page(write_report(run))
    history = read_history(run)
    assert len(history.training["step"]) == rows and sum(history.event_counts.values()) == 2000
    assert "1,800 more between these" in page.text
    assert (
        page.charts is not None
        and page.charts["tables"] == json.loads(charts(history, summarize(history)).to_json())["tables"]
    )
    norms = page.column("Gradient norm", 0)
    assert max(norms) == 51 and len(norms) < 8000, "a single spike among all rows is drawn"
    chart = next(chart for chart in page.charts["charts"] if chart["title"] == "Gradient norm")
    assert chart["high"] < 2, "and does not flatten the others"


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    write_long(tmp_path / "run", 20_000)
    check_long(tmp_path / "run", 20_000)


@pytest.mark.slow
def test_a_million_rows_make_a_small_page(tmp_path: Path) -> None:
    write_long(tmp_path / "run", 1_000_000)
    check_long(tmp_path / "run", 1_000_000)


@given(steps=st.lists(st.integers(0, 10_000), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_samples_shown_are_the_first_the_last_and_some_between(steps: list[int]) -> None:
    told = select_samples([{"step": step, "prompt": "p", "text": f"p{step}"} for step in steps])
    shown = [int(card.step.replace(",", "")) for card in told[0].cards]
    assert shown == sorted(set(shown)) and shown[0] == min(steps) and shown[-1] == max(steps)
    assert len(shown) == min(MAX_CARDS, len(set(steps))) and told[0].hidden == len(set(steps)) - len(shown)
    assert all(card.text == card.step.replace(",", "") for card in told[0].cards)  # the prompt is not told twice
