"""Debian's chromium on a page of the slow run: its three checkpoints write slowly enough to be watched."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving_fixtures import STEPS, Server, serving, wait_until, write_chat_model, write_run

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
def page_run(tmp_path_factory) -> Path:
    """A run whose model writes slowly enough to be watched."""
    return write_run(tmp_path_factory.mktemp("runs") / "tales-tiny", idle_layers=72)


@pytest.fixture(scope="session")
def page_server(page_run) -> Iterator[Server]:
    """A server with the page."""
    with serving(page_run, "--quantize", "fp32") as running:
        yield running


@pytest.fixture(scope="session")
def chat_server(page_run, tmp_path_factory) -> Iterator[Server]:
    """A server of the same model with a chat template and a generation_config, below a path."""
    model = write_chat_model(
        page_run, tmp_path_factory.mktemp("models") / "tales-chat", temperature=0.6, top_p=0.95, max_new_tokens=60
    )
    with serving(model, "--quantize", "fp32", "--root-path", "/llm") as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    """A browser. While it runs, so does its event loop in this thread, where a test of another file may start its own."""
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


@contextlib.contextmanager
def visits(chromium, server: Server, path: str = "/"):
    """Opens pages of a server, and checks each at the end."""
    opened: list[Visit] = []

    def open_page(path: str = path, **context) -> Visit:
        opened.append(Visit(chromium, server, path, **context))
        return opened[-1]

    yield open_page
    for one in opened:
        one.close()


@pytest.fixture
def visit(chromium, page_server):
    """Opens the page of the run."""
    with visits(chromium, page_server) as open_page:
        yield open_page


@pytest.fixture
def visit_chat(chromium, chat_server):
    """Opens the page of the model that has a chat template."""
    with visits(chromium, chat_server, "/llm/") as open_page:
        yield open_page


def until(page, true: str) -> None:
    """Wait until a JavaScript expression is true. Playwright's own way needs eval, which the page forbids."""
    wait_until(lambda: page.evaluate(true), 20, lambda: true)


def never_end(visit: Visit) -> None:
    """From now on every text goes on to its last token: a test can stop it wherever it likes."""

    def ignore_eos(route) -> None:
        body = json.loads(route.request.post_data)
        route.continue_(post_data=json.dumps({**body, "ignore_eos": True}))

    visit.page.route(re.compile("/(page/write|v1/chat/completions)$"), ignore_eos)


@contextlib.contextmanager
def halted(server: Server) -> Iterator[None]:
    """The server writes nothing meanwhile, so that a text cannot end before the test has seen it and stopped it."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def open_tab(visit: Visit, name: str) -> None:
    """Click a tab."""
    visit.page.get_by_role("tab", name=name).click()


def walk_tabs(visit: Visit, shot: Callable[[str], None]) -> None:
    """Open each tab but the first, and shoot it when it shows what it is for."""
    open_tab(visit, "Time-lapse")
    shot("timelapse-empty")
    visit.page.click("#timelapse-start")
    visit.page.wait_for_selector(f".card[data-step='{STEPS[-1]}'][data-state=done]", timeout=60_000)
    shot("timelapse")
    open_tab(visit, "Training")
    visit.page.wait_for_selector("#charts canvas")
    shot("training")
    open_tab(visit, "API")
    shot("api")


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.browser)
