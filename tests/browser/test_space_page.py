"""The exported Space, started as the Hub starts it, in a real browser: a prompt goes in, text comes out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from conftest import CHROMIUM, Visit
from serving_fixtures import Server, wait_until, write_run
from smolforge.export.space import export_space

TITLE = "A cat's tale"


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`python app.py` in the Space's own directory, with its own copy of the package."""
    if not CHROMIUM.exists():
        pytest.skip("Debian's chromium is not installed: apt-get install chromium")
    run = write_run(tmp_path_factory.mktemp("runs") / "tales-tiny")
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
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200, 90)
        yield server
    finally:
        assert server.stop() == 0


def test_a_visitor_writes_with_it(chromium, space: Server) -> None:
    visit = Visit(chromium, space)
    assert TITLE in visit.page.inner_text("body")
    visit.page.fill("#prompt", "Once upon a time")
    visit.page.click("#submit")
    visit.page.wait_for_selector("#text[aria-busy=false] .token")
    tokens = visit.page.locator(".token").all_text_contents()
    assert len(tokens) > 5 and "".join(tokens).strip()
    visit.close()


def test_it_has_the_page_of_a_phone_too(chromium, space: Server) -> None:
    visit = Visit(chromium, space, viewport={"width": 390, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    visit.close()
