"""The page in a real browser: seeds and links that reproduce, errors in sight, what survives a reload, several runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_page import ONCE, finished, submit, written

from conftest import SHOTS, Visit, open_tab, until, visits, walk_tabs
from serving_fixtures import STEPS, Server, serving


@pytest.fixture(scope="module")
def several(page_run, tmp_path_factory) -> Iterator[tuple[Path, Server]]:
    """A directory of two runs, and a server of it."""
    folder = tmp_path_factory.mktemp("several") / "runs"
    for name in ("first-try", "second-try"):
        shutil.copytree(page_run, folder / name, symlinks=True)
    lines = [json.loads(line) for line in (folder / "second-try" / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        if "loss" in row:
            row["loss"] += 0.4
    (folder / "second-try" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    with serving(folder, "--quantize", "fp32") as running:
        yield folder, running


@pytest.fixture
def visit_several(chromium, several):
    """Opens the page of the directory of runs."""
    with visits(chromium, several[1]) as open_page:
        yield open_page


def seed_of(visit: Visit) -> int:
    """The seed of the text that is shown."""
    found = re.search(r"seed (\d+)", visit.page.inner_text("#figures"))
    assert found
    return int(found[1])


def test_a_seed_that_is_typed_counts_and_an_empty_field_draws_one(visit):
    one = visit()
    one.page.fill("#seed", "11")
    submit(one, tokens=4)
    finished(one)
    assert seed_of(one) == 11 and one.page.is_checked("#keep")
    one.page.fill("#seed", "")
    assert not one.page.is_checked("#keep")
    one.page.click("#submit")
    until(one.page, "document.querySelector('.takes').textContent === '2 of 2'")
    finished(one)
    assert seed_of(one) != 11


def test_a_seed_that_is_none_is_told_beside_its_field(visit):
    page = visit().page
    page.fill("#seed", "lucky")
    assert "must be a whole number" in page.inner_text("#seed-hint")
    assert page.get_attribute("#seed", "aria-invalid") == "true"
    page.fill("#prompt", ONCE)
    assert page.input_value("#seed") == "lucky", "what is typed elsewhere leaves it alone"
    page.fill("#seed", "7")
    assert page.get_attribute("#seed", "aria-invalid") == "false" and "Equal seeds" in page.inner_text("#seed-hint")


def test_a_link_writes_the_text_that_is_shown_though_its_seed_was_drawn(visit):
    one = visit()
    one.context.grant_permissions(["clipboard-read", "clipboard-write"])
    submit(one, tokens=10)
    text = finished(one)
    one.page.fill("#prompt", "Something else")  # the link is of the text, not of what is typed since
    one.page.click("#link")
    until(one.page, "document.querySelector('#link').textContent === 'Copied'")
    link = one.page.evaluate("navigator.clipboard.readText()")
    two = visit("/#" + link.partition("#")[2])
    until(two.page, f"document.querySelector('#prompt').value === '{ONCE}'")
    two.page.click("#submit")
    assert finished(two) == text
    one.page.click("#continue")
    until(one.page, "document.querySelectorAll('.token').length > 10")
    finished(one)
    assert one.page.is_disabled("#link"), "a text that was continued is no single request"


def test_temperature_begins_at_zero_and_always_takes_the_likeliest(visit):
    one = visit()
    page = one.page
    assert page.get_attribute("#temperature input[type=range]", "min") == "0"
    page.fill("#temperature-number", "0")
    page.press("#temperature-number", "Tab")
    assert page.input_value("#temperature-number") == "0"
    submit(one, tokens=20)
    first, seed = finished(one), seed_of(one)
    page.click("#submit")
    until(page, "document.querySelector('.takes').textContent === '2 of 2'")
    assert finished(one) == first and seed_of(one) != seed


def test_an_error_is_above_the_text_where_it_is_seen(visit):
    one = visit()
    submit(one, "word " * 3000)
    one.page.wait_for_selector("#problem:not([hidden])")
    assert "1024" in one.page.inner_text("#problem")
    box = one.page.locator("#problem").bounding_box()
    assert box and 0 <= box["y"] < 900 - box["height"]
    one.page.fill("#prompt", ONCE)
    one.page.click("#submit")
    finished(one)
    assert one.page.locator("#problem").is_hidden()
    one.errors.clear()  # the browser reports the 400 on its console, as it should


def test_a_server_that_is_gone_is_told_in_our_words(visit):
    one = visit()
    one.page.route("**/page/write", lambda route: route.abort())
    submit(one)
    one.page.wait_for_selector("#problem:not([hidden])")
    assert one.page.inner_text("#problem") == "The server does not answer. Is it still running?"
    open_tab(one, "Time-lapse")
    one.page.route("**/page/timelapse", lambda route: route.abort())
    one.page.click("#timelapse-start")
    until(one.page, "document.querySelector('#timelapse .note').classList.contains('bad')")
    assert "does not answer" in one.page.inner_text("#timelapse .note")
    one.errors.clear()


def test_a_reload_shows_the_same_again(visit):
    one = visit()
    page = one.page
    page.fill("#temperature-number", "0.55")
    page.press("#temperature-number", "Tab")
    submit(one, tokens=12)
    first = finished(one)
    page.fill("#prompt", "Another beginning")
    page.click("#submit")
    until(page, "document.querySelector('.takes').textContent === '2 of 2'")
    second = finished(one)
    page.fill("#prompt", "A third, not sent")
    page.reload()
    page.wait_for_selector("#status.ready", state="attached")
    assert written(one) == second and page.inner_text(".takes") == "2 of 2"
    assert page.input_value("#prompt") == "A third, not sent" and page.input_value("#temperature-number") == "0.55"
    page.click("#back")
    assert written(one) == first
    page.hover(".token >> nth=1")
    page.locator("#popover .choice").first.wait_for()
    open_tab(one, "Training")
    page.reload()
    page.wait_for_selector("#charts canvas")
    assert page.get_attribute("#tab-training", "aria-selected") == "true"


def test_a_link_wins_over_what_was_kept(visit):
    one = visit("/#prompt=From+a+link&seed=4")
    until(one.page, "document.querySelector('#prompt').value === 'From a link'")
    one.page.fill("#prompt", "Changed")
    one.page.reload()
    one.page.wait_for_selector("#status.ready", state="attached")
    assert one.page.input_value("#prompt") == "Changed"
    one.page.evaluate("window.location.hash = 'prompt=Another+link'")
    until(one.page, "document.querySelector('#prompt').value === 'Another link'")
    assert not one.page.is_checked("#keep")


def test_a_model_without_a_run_says_so_in_its_tabs(visit_chat):
    one = visit_chat()
    open_tab(one, "Training")
    until(one.page, "document.querySelector('#run').textContent.includes('does not belong to a run')")
    assert one.page.locator("#training canvas").count() == 0
    open_tab(one, "Time-lapse")
    assert "does not belong to a run" in one.page.inner_text("#timelapse .note")
    assert one.page.is_disabled("#timelapse-start") and one.page.locator("#runs").is_hidden()


def test_the_keys_are_shown(visit):
    one = visit()
    assert one.page.locator(".keys-hint kbd").all_text_contents() == ["Ctrl", "Enter", "Escape", "←", "→", "Enter"]
    assert one.page.locator(".keys-hint").is_visible()


def test_several_runs_are_compared_in_one_chart_and_the_logs_are_followed(visit_several, several):
    one = visit_several()
    page = one.page
    open_tab(one, "Training")
    page.wait_for_selector("#charts canvas")
    data = "document.querySelector('#charts figure').plot.data"
    until(page, f"{data}.length === 5")
    steps, first, _, second, _ = page.evaluate(data)
    assert len(steps) == STEPS[-1] and second[80] - first[80] == pytest.approx(0.4, abs=0.01)
    told = page.locator("#compared label").all_inner_texts()
    assert [re.split(r"\s", text.strip())[0] for text in told] == ["first-try", "second-try"]
    assert all(f"step {STEPS[-1]}" in text and "loss 0." in text for text in told)
    with (several[0] / "second-try" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STEPS[-1] + 1, "tokens": 1, "loss": 0.3}) + "\n")
    until(page, f"{data}[0].length === {STEPS[-1] + 1}")
    page.get_by_role("checkbox", name="second-try").uncheck()
    until(page, f"{data}.length === 3")
    page.hover("#charts .u-over >> nth=0")
    assert re.match(r"step \d+: first-try \d", page.inner_text("#charts .value >> nth=0"))
    page.get_by_role("checkbox", name="first-try").uncheck()
    until(page, f"{data}.length === 1")
    page.get_by_role("checkbox", name="second-try").check()
    until(page, f"{data}.length === 3")


def test_another_run_is_served_when_it_is_chosen(visit_several):
    one = visit_several()
    page = one.page
    assert page.locator("#served option").all_text_contents() == ["first-try", "second-try"]
    served = page.input_value("#served")
    other = {"first-try": "second-try", "second-try": "first-try"}[served]
    page.select_option("#served", other)
    until(page, f"document.querySelector('#model').textContent === '{other}'")
    submit(one, tokens=4)
    assert finished(one).startswith(ONCE)
    page.route("**/page/serve", lambda route: route.abort())
    page.select_option("#served", served)
    until(page, "document.querySelector('#served-problem').textContent.includes('does not answer')")
    until(page, f"document.querySelector('#served').value === '{other}'")
    one.errors.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "width", "height"), [("desktop", 1440, 900), ("phone", 390, 844)])
def test_each_tab_of_several_runs_fits_and_axe_finds_nothing(visit_several, scheme, device, width, height):
    axe = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js").read_text()
    SHOTS.mkdir(exist_ok=True)
    touch = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2} if device == "phone" else {}
    size = {"width": width, "height": height}
    one = visit_several(viewport=size, color_scheme=scheme, reduced_motion="reduce", **touch)
    page = one.page

    def shot(name: str) -> None:
        page.wait_for_timeout(250)
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{name} is {wide} px too wide"
        page.screenshot(path=SHOTS / f"runs-{device}-{scheme}-{name}.png", full_page=True)
        page.evaluate(axe)
        found = page.evaluate(
            "axe.run().then((r) => r.violations.map((v) => [v.id, v.impact, v.nodes.map((n) => n.html.slice(0, 150))]))"
        )
        assert found == [], f"{name}: {json.dumps(found, indent=1)}"

    page.fill("#seed", "5")
    submit(one, tokens=60)
    finished(one)
    shot("written")
    page.route("**/page/write", lambda route: route.abort())
    page.fill("#seed", "five")
    submit(one)
    page.wait_for_selector("#problem:not([hidden])")
    shot("problem")
    walk_tabs(one, shot)
    one.errors.clear()
