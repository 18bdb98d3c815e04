"""report.html and compare's page in a real browser, from a file: uPlot draws, hovers, zooms, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from made_runs import make_run, write

from smolforge.report import write_comparison, write_report


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder / "tale", rows=500)
    with (run / "metrics.jsonl").open("a") as file:  # a rollback, and a step whose loss is missing
        write(file, {"step": 480, "event": "rollback", "skipped": [470, 480], "count": 1})
        write(file, {"step": 481, "tokens": 481 * 4096, "loss": None, "lr": 1e-3, "time": 1_760_020_000})
        write(file, {"step": 482, "tokens": 482 * 4096, "loss": 1.4, "lr": 1e-3, "time": 1_760_020_001})
    other = make_run(folder / "other", rows=60, total=500, seed=1)
    return write_report(run), write_comparison([run, other], folder / "compare.html")


@pytest.fixture(params=["light", "dark"])
def page(chromium, request: pytest.FixtureRequest) -> Iterator:
    context = chromium.new_context(viewport={"width": 1200, "height": 900}, color_scheme=request.param)
    page, errors, requests = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    yield page
    context.close()
    assert errors == [] and all(url.startswith(("file:", "data:")) for url in requests)


def ticks(page) -> bytes:
    return page.locator("figure.chart").first.screenshot()


def test_charts_are_drawn_hovered_zoomed_and_reset(page, pages: tuple[Path, Path]) -> None:
    page.goto(pages[0].as_uri())
    charts = page.locator("figure.chart").count()
    assert charts == page.locator(".plot canvas").count() == 8
    over = page.locator(".u-over").first
    over.scroll_into_view_if_needed()
    before, box = ticks(page), over.bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 60)
    tips = page.locator(".tip:not([hidden])")
    assert "step " in tips.first.inner_text() and "training: " in tips.first.inner_text()
    assert tips.count() >= 5, "the charts of one x axis share the cursor"
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 70, steps=4)
    page.mouse.up()
    page.mouse.move(2, 2)
    assert ticks(page) != before
    page.mouse.dblclick(box["x"] + 300, box["y"] + 60)
    page.mouse.move(2, 2)
    assert ticks(page) == before


def test_curves_can_be_hidden_and_x_can_be_logarithmic(page, pages: tuple[Path, Path]) -> None:
    page.goto(pages[0].as_uri())
    before = ticks(page)
    page.get_by_role("button", name="training").first.click()
    hidden = ticks(page)
    assert hidden != before
    page.check("#log-x")
    assert ticks(page) not in (before, hidden) and page.locator(".plot canvas").count() == 8


def test_the_page_fits_a_phone_and_prints(page, pages: tuple[Path, Path], tmp_path: Path) -> None:
    page.goto(pages[0].as_uri())
    page.pdf(path=str(tmp_path / "page.pdf"))
    assert (tmp_path / "page.pdf").stat().st_size > 50_000
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("document.documentElement.scrollWidth <= 390")


def test_the_comparison_draws_too(page, pages: tuple[Path, Path]) -> None:
    page.goto(pages[1].as_uri())
    assert page.locator("figure.chart").count() == page.locator(".plot canvas").count() == 6
