"""The exported Space, started as the Hub starts it, in a real browser: a prompt goes in, text comes out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from conftest import CHROMIUM, Visit
from serving_fixtures import Server, wait_until, write_run
from smolforge.export.space import export_space

if TYPE_CHECKING:
    from playwright.sync_api import Route

TITLE = "A cat's tale"


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`python app.py` in the Space's own directory, with its own copy of the package."""
    if not CHROMIUM.exists():
        pytest.skip("Debian's chromium is not installed: apt-get install chromium")
    run = write_run(tmp_path_factory.mktemp("runs") / "tales-tiny", idle_layers=300)
    place = export_space(run, tmp_path_factory.mktemp("spaces") / "space", title=TITLE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=place, env=environment, stderr=subprocess.DEVNULL, text=True
    )
    server = Server(process, f"http://127.0.0.1:{port}", [])
    try:
        wait_until(lambda: httpx.get(f"{server.url}/gradio_api/info").status_code == 200, 90)
        yield server
    finally:
        server.stop()


def open_page(chromium, space: Server, **context) -> Visit:
    visit = Visit(chromium, space, ready="#submit", **context)
    assert TITLE in visit.page.inner_text("body")
    return visit


def test_a_visitor_writes_with_it(chromium, space: Server) -> None:
    visit = open_page(chromium, space)
    output = visit.page.locator("#output textarea")
    visit.page.fill("#prompt textarea", "Once upon a time")
    visit.page.click("#submit")
    visit.page.wait_for_function("document.querySelector('#output textarea').value.length > 40")
    assert output.input_value().startswith("Once upon a time")
    visit.page.click("#clear")
    visit.page.wait_for_function("document.querySelector('#output textarea').value === ''")
    assert visit.page.input_value("#prompt textarea") == ""
    visit.page.get_by_text("In the distant galaxy").click()
    visit.page.wait_for_function("document.querySelector('#prompt textarea').value === 'In the distant galaxy'")
    visit.close()


def test_clear_also_empties_what_arrives_after_it(chromium, space: Server) -> None:
    """The server hears of Clear late, so that text is shown after the page was emptied."""
    visit = open_page(chromium, space)
    held: list[Route] = []
    visit.page.route("**/cancel", lambda route: held.append(route))
    visit.page.fill("#prompt textarea", "Once upon a time")
    # The page itself clicks at the first word: a text may be short, and a test hears of a word too late.
    visit.page.evaluate("""() => {
        const output = document.querySelector('#output textarea');
        const first = setInterval(() => {
            if (output.value.length <= 17) return;
            clearInterval(first);
            document.querySelector('#clear').click();
            output.value = '';
            setInterval(() => { window.returned ||= output.value !== ''; }, 1);
        }, 1);
    }""")
    visit.page.click("#submit")
    visit.page.wait_for_function("window.returned")
    for route in held:
        route.continue_()
    visit.page.wait_for_function("document.querySelector('#output textarea').value === ''")
    visit.page.fill("#prompt textarea", "Once upon a time")
    visit.page.click("#submit")
    visit.page.wait_for_function("document.querySelector('#output textarea').value.length > 17")
    visit.close()


def test_the_seeds_controls_are_there(chromium, space: Server) -> None:
    visit = open_page(chromium, space)
    for label in ("Prompt", "Maximum number of new tokens", "Temperature", "Top-p", "Top-k"):
        assert visit.page.get_by_text(label, exact=True).count(), label
    visit.close()


def test_it_fits_a_phone(chromium, space: Server) -> None:
    visit = open_page(chromium, space, viewport={"width": 390, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    visit.close()
