"""Behind a real nginx: plain proxy_pass, a prefix that it takes off, and one that it leaves on."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time

import httpx
import pytest

from serving_fixtures import serving

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
CONFIG = """
daemon off; pid {place}/pid; error_log {place}/error.log; worker_processes 1; {user}
events {{}}
http {{
  access_log off; client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;
  uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
  server {{ listen 127.0.0.1:{plain}; location / {{ proxy_pass {upstream}; }}
            location /llm/ {{ proxy_pass {upstream}/; }} }}
  server {{ listen 127.0.0.1:{kept}; location /llm {{ proxy_pass {upstream}; }} }}
}}
"""
KEY = "sesame-open-9"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def places(tiny_run, tmp_path_factory):
    """Where nginx serves the page: at its root, under a prefix that the server does not see, and under one that it does."""
    place, plain, kept = tmp_path_factory.mktemp("nginx"), free_port(), free_port()
    with serving(tiny_run, "--root-path", "/llm", key=KEY) as server:
        import os

        user = "user root;" if os.getuid() == 0 else ""
        (place / "conf").write_text(CONFIG.format(place=place, plain=plain, kept=kept, upstream=server.url, user=user))
        process = subprocess.Popen(["nginx", "-p", str(place), "-c", str(place / "conf")])
        try:
            end = time.monotonic() + 30
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{kept}/llm/health")
                    break
                except httpx.TransportError:
                    assert process.poll() is None and time.monotonic() < end, (place / "error.log").read_text()
                    time.sleep(0.05)
            yield {
                "plain": f"http://127.0.0.1:{plain}/", "stripped": f"http://127.0.0.1:{plain}/llm/",
                "kept": f"http://127.0.0.1:{kept}/llm/",
            }  # fmt: skip
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize("name", ["plain", "stripped", "kept"])
def test_the_page_works_as_a_browser_asks_for_it(places, name):
    page = places[name]
    origin = page.split("/", 3)
    origin = "/".join(origin[:3])  # what a browser names, and the server behind nginx does not know
    with httpx.Client(follow_redirects=True, timeout=60) as browser:
        login = browser.get(page)
        assert str(login.url) == f"{page}login" and "<form" in login.text
        style = re.search(r'href="([^"]+login.css)"', login.text)
        assert style and browser.get(page + style[1]).status_code == 200
        sent = browser.post(f"{page}login", data={"key": KEY}, headers={"Origin": origin}, follow_redirects=False)
        entered = browser.get(sent.url.join(sent.headers["location"]))
        assert str(entered.url) == page and "<textarea" in entered.text
        for file in re.findall(r'(?:src|href)="(page/static/[^"]+)"', entered.text):
            # Chrome names the origin for modules.
            assert browser.get(page + file, headers={"Origin": origin}).status_code == 200, file
        assert browser.get(f"{page}page/state").json()["ready"]
        body = {"prompt": "Once upon a time", "max_tokens": 5, "seed": 1}
        own = {"Origin": origin, "X-Requested-With": "smolforge"}
        written = browser.post(f"{page}page/write", json=body, headers=own)
        assert written.status_code == 200 and written.text.count("data: ") > 1
        foreign = {"Origin": "https://evil.example"}
        assert browser.post(f"{page}page/write", json=body, headers=foreign).status_code == 403


@pytest.mark.parametrize("name", ["plain", "stripped", "kept"])
def test_the_api_works_and_streams(places, name):
    import openai

    client = openai.OpenAI(base_url=f"{places[name]}v1", api_key=KEY, max_retries=0, timeout=60)
    model = client.models.list().data[0].id
    chunks = client.completions.create(model=model, prompt="Once upon a time", max_tokens=40, seed=1, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    whole = client.completions.create(model=model, prompt="Once upon a time", max_tokens=40, seed=1)
    assert whole.choices[0].text == text
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{places[name]}v1", api_key="wrong", max_retries=0).models.list()


def test_the_prefix_itself_leads_to_the_page(places):
    bare = places["kept"].rstrip("/")
    answer = httpx.get(bare, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 307 and answer.headers["location"].endswith("/llm/")
