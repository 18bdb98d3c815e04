"""Debian's chromium on a page of the slow run: its three checkpoints write slowly enough to be watched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving_fixtures import Server, serving, write_run

CHROMIUM = Path("/usr/bin/chromium")
# A new browser looks for updates, syncs and reports by itself; none of that belongs to the page.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHOTS = Path(__file__).parents[2] / "screenshots"


@pytest.fixture(scope="session")
def page_server(tmp_path_factory) -> Iterator[Server]:
    """A server with the page."""
    run = write_run(tmp_path_factory.mktemp("runs") / "tales-tiny", idle_layers=72)
    with serving(run, "--quantize", "fp32") as running:
        yield running


@pytest.fixture(scope="session")
def chromium():
    """A browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("Debian's chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """One open page and what it did: requests to other machines and errors are kept."""

    def __init__(self, chromium, server: Server, path: str = "/", ready: str = "#status.ready", **context) -> None:
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.server = server
        self.page.goto(server.url + path)
        self.page.wait_for_selector(ready, state="attached")

    def close(self) -> None:
        """Close it; nothing may have left this machine, nothing may have failed."""
        self.context.close()
        foreign = [url for url in self.requests if not url.startswith((self.server.url, "data:", "blob:"))]
        assert foreign == [], foreign
        assert self.errors == [], self.errors


@pytest.fixture
def visit(chromium, page_server):
    """Opens pages, and checks each at the end."""
    opened: list[Visit] = []

    def open_page(path: str = "/", **context) -> Visit:
        opened.append(Visit(chromium, page_server, path, **context))
        return opened[-1]

    yield open_page
    for one in opened:
        one.close()


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.browser)
