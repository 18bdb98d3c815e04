"""The 28 points of the checklist, with OpenAI's own client against a real process."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from serving_fixtures import CONTEXT, Server, metric, serving, wait_until

ONCE = "Once upon a time"
MODEL = "tiny-chat"
LONG = {"ignore_eos": True}


def complete(client: openai.OpenAI, prompt=ONCE, **options):
    options.setdefault("max_tokens", 24)
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def raw(server: Server, **body) -> httpx.Response:
    return server.post("/v1/completions", body)


def sse(response: httpx.Response) -> list[str]:
    """The data of each event."""
    return [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_01_model_list_has_one_entry_with_its_id(client):
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_02_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-4", prompt=ONCE)
    assert error.value.code == "model_not_found" and MODEL in str(error.value)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_03_a_completion_is_whole(client, tokenizer):
    before = int(time.time())
    answer = complete(client, max_tokens=7, extra_body=LONG)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == MODEL
    assert before - 1 <= answer.created <= time.time() + 1
    assert [choice.index for choice in answer.choices] == [0] and answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert usage.prompt_tokens == len(tokenizer.encode(ONCE)) and usage.completion_tokens == 7
    assert usage.total_tokens == usage.prompt_tokens + 7


def test_04_every_form_of_prompt_and_n_in_order(client, tokenizer):
    text = complete(client, temperature=0).choices[0].text
    ids = tokenizer.encode(ONCE)
    other = "In the distant galaxy"
    two = [complete(client, prompt, temperature=0).choices[0].text for prompt in (ONCE, other)]
    for prompt, wanted in (
        ([ONCE], [text]), (ids, [text]), ([ids], [text]), ([ONCE, other], two), ([ids, tokenizer.encode(other)], two),
    ):  # fmt: skip
        answer = complete(client, prompt, temperature=0)
        assert [c.text for c in answer.choices] == wanted, prompt
        assert [c.index for c in answer.choices] == list(range(len(wanted)))
    answer = complete(client, [ONCE, other], n=3, seed=1, echo=True)
    assert [c.index for c in answer.choices] == list(range(6))
    assert [c.text.startswith(ONCE) for c in answer.choices] == [True] * 3 + [False] * 3
    assert len({c.text for c in answer.choices[:3]}) > 1, "the choices of one prompt must differ"


def test_05_equal_prompts_at_temperature_0_are_equal(client):
    answer = complete(client, [ONCE] * 5, temperature=0, max_tokens=40)
    assert len({choice.text for choice in answer.choices}) == 1


BAD_PROMPTS = [
    [], [[]], [-1], [[-1]], [10**9], [[1], [10**9]], True, [True], [[False]], 3, 1.5, {}, [None], [ONCE, 3], [1, ONCE],
    [[1], ONCE], [[[1]]], [1.5], [10**40], "", ["", ONCE], ["\ud800"], {"text": ONCE},
]  # fmt: skip


def test_06_bad_prompts_are_refused_and_the_server_works_after(server, client):
    for prompt in BAD_PROMPTS:
        response = server.post("/v1/completions", content=json.dumps({"prompt": prompt}).encode(), headers=JSON)
        assert response.status_code == 400, (prompt, response.text)
        error = response.json()["error"]
        assert error["param"] == "prompt" and error["message"].startswith("prompt"), (prompt, error)
    assert complete(client).choices[0].text


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 11}, {"seed": 12, "n": 2, "stop": [" the"]}])
def test_07_a_joined_stream_is_the_whole_text(client, settings):
    whole = complete(client, max_tokens=60, extra_body=LONG, **settings)
    texts: dict[int, str] = {}
    for chunk in complete(client, max_tokens=60, stream=True, extra_body=LONG, **settings):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert [texts[i] for i in sorted(texts)] == [choice.text for choice in whole.choices]


def test_08_streams_are_well_formed(server, client):
    events = sse(raw(server, prompt=[ONCE, "One day"], n=2, max_tokens=9, stream=True))
    assert events[-1] == "[DONE]" and "[DONE]" not in events[:-1]
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    reasons = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(reasons) == [0, 1, 2, 3]
    messages = [{"role": "user", "content": ONCE}]
    chat = list(client.chat.completions.create(model=MODEL, messages=messages, stream=True, max_tokens=9))
    assert chat[0].choices[0].delta.role == "assistant" and chat[0].object == "chat.completion.chunk"
    assert all(chunk.choices[0].delta.role is None for chunk in chat[1:])
    assert len({chunk.id for chunk in chat}) == 1
    assert [bool(chunk.choices[0].finish_reason) for chunk in chat] == [False] * (len(chat) - 1) + [True]


def test_09_usage_of_a_stream(server, client):
    chunks = list(complete(client, max_tokens=5, stream=True, stream_options={"include_usage": True}, extra_body=LONG))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in complete(client, max_tokens=2, stream=True))
    response = raw(server, prompt=ONCE, stream_options={"include_usage": True})
    assert response.status_code == 400 and response.json()["error"]["param"] == "stream_options"


def test_10_logprobs(server, client, tokenizer):
    plain = complete(client, temperature=0, logprobs=0, max_tokens=8).choices[0]
    assert len(plain.logprobs.tokens) == len(plain.logprobs.token_logprobs) == 8
    assert "".join(plain.logprobs.tokens) == plain.text
    assert all(len(top) == 1 for top in plain.logprobs.top_logprobs)
    five = complete(client, temperature=0, logprobs=5, max_tokens=8).choices[0].logprobs
    for token, logprob, top in zip(five.tokens, five.token_logprobs, five.top_logprobs, strict=True):
        assert len(top) == 5 and logprob == max(top.values()) == top[token] <= 0
    assert raw(server, prompt=ONCE, logprobs=6).json()["error"]["param"] == "logprobs"
    echoed = complete(client, echo=True, logprobs=1, max_tokens=3, temperature=0).choices[0]
    assert echoed.logprobs.token_logprobs[0] is None and echoed.logprobs.top_logprobs[0] is None
    assert all(value is not None for value in echoed.logprobs.token_logprobs[1:])
    starts = echoed.logprobs.text_offset
    for token, start in zip(echoed.logprobs.tokens, starts, strict=True):
        assert echoed.text[start:].startswith(token)
    # The bytes of a rare character are tokens of their own.
    rare = complete(client, "a 語", echo=True, logprobs=0, max_tokens=0).choices[0]
    assert rare.text == "a 語"
    assert any(token.startswith("bytes:\\x") for token in rare.logprobs.tokens)
    assert rare.logprobs.text_offset[-1] == 2
    stopped = complete(client, stop=[" time there"], prompt="Once upon a", temperature=0, logprobs=0).choices[0]
    assert "".join(stopped.logprobs.tokens) == stopped.text == ""


def test_11_stop_strings(client):
    free = complete(client, temperature=0, max_tokens=20).choices[0].text
    assert " there was a " in free
    for stop in ("re wa", ["zzz", "re wa"], ["was a", "re wa"], [" there was"], ["s a l", "re wa"]):
        answer = complete(client, temperature=0, max_tokens=20, stop=stop).choices[0]
        cut = min(free.index(s) for s in ([stop] if isinstance(stop, str) else stop) if s in free)
        assert answer.text == free[:cut] and answer.finish_reason == "stop", stop
        stream = complete(client, temperature=0, max_tokens=20, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == free[:cut], stop
    # What only looks like the beginning of a stop is not lost.
    answer = complete(client, temperature=0, max_tokens=20, stop=free[-4:] + "#")
    assert answer.choices[0].text == free and answer.choices[0].finish_reason == "length"


def test_12_no_field_is_ignored_silently(server, client):
    harmless = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "x"}
    neutral = {
        "tools": [], "response_format": {"type": "text"}, "suffix": None, "best_of": 1, "store": False,
        "no_repeat_ngram_size": 0, "repeat_penalty": 1.0, "length_penalty": 1, "dry_multiplier": 0.0, "skip_special_tokens": True, "chat_template_kwargs": {},
    }  # fmt: skip
    assert raw(server, prompt=ONCE, max_tokens=2, **harmless, **neutral).status_code == 200
    for field, value in {
        "best_of": 2, "suffix": "end", "tools": [{"type": "function"}], "response_format": {"type": "yaml"},
        "store": True, "grammar": "root ::= x", "reasoning_effort": "high", "guided_json": {"type": "object"},
        "chat_template": "x", "chat_template_kwargs": {"a": 1}, "repeat_penalty": 1.1,
        "include_stop_str_in_output": True, "no_repeat_ngram_size": 3, "some_new_field": None, "temprature": 0.5,
    }.items():  # fmt: skip
        response = raw(server, prompt=ONCE, **{field: value})
        assert response.status_code == 400 and response.json()["error"]["param"] == field, field
        chat = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], field: value})
        assert chat.status_code == 400 and chat.json()["error"]["param"] == field, field
    assert "did you mean temperature" in raw(server, prompt=ONCE, temprature=0.5).json()["error"]["message"]
    for alias in ("max_completion_tokens", "max_new_tokens", "n_predict"):
        answer = raw(server, prompt=ONCE, ignore_eos=True, **{alias: 3})
        assert answer.json()["usage"]["completion_tokens"] == 3, alias
    for n in (0, 17):
        assert raw(server, prompt=ONCE, n=n).json()["error"]["param"] == "n"
    assert raw(server, prompt=ONCE, repetition_penalty=5e-324).json()["error"]["param"] == "repetition_penalty"
    with pytest.raises(openai.BadRequestError) as error:
        parts = [{"type": "image_url", "image_url": {"url": "http://x"}}]
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert error.value.param == "messages"


def test_13_a_seed_is_reproducible_alone_and_under_load(client):
    def write() -> str:
        return complete(client, seed=5, max_tokens=60, extra_body=LONG).choices[0].text

    alone = write()
    assert alone == write()
    stop = threading.Event()

    def press(seed: int) -> None:
        while not stop.is_set():
            complete(client, "In the " * (seed + 1), seed=seed, max_tokens=40, extra_body=LONG)

    others = [threading.Thread(target=press, args=(seed,)) for seed in range(6)]
    for thread in others:
        thread.start()
    try:
        assert [write() for _ in range(4)] == [alone] * 4
    finally:
        stop.set()
        for thread in others:
            thread.join()
    assert complete(client, seed=6, max_tokens=60, extra_body=LONG).choices[0].text != alone


def test_14_temperature_0_takes_the_likeliest(client):
    answers = [complete(client, temperature=0, seed=seed, logprobs=1).choices[0] for seed in (1, 2)]
    assert answers[0].text == answers[1].text
    for token, top in zip(answers[0].logprobs.tokens, answers[0].logprobs.top_logprobs, strict=True):
        assert max(top, key=top.get) == token


def test_15_max_tokens(server, client, tokenizer):
    echo = complete(client, max_tokens=0, echo=True)
    assert echo.choices[0].text == ONCE and echo.choices[0].finish_reason == "length"
    assert echo.usage.completion_tokens == 0
    assert complete(client, max_tokens=1).usage.completion_tokens == 1
    assert complete(client, max_tokens=None, extra_body=LONG).usage.completion_tokens == 16
    full = complete(client, max_tokens=10 * CONTEXT, extra_body=LONG, temperature=0)
    assert full.usage.total_tokens == CONTEXT and full.choices[0].finish_reason == "length"
    long = tokenizer.encode("a") * (CONTEXT + 50)
    response = raw(server, prompt=long)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "prompt" and error["code"] == "context_length_exceeded"
    assert str(len(long)) in error["message"] and str(CONTEXT) in error["message"]


def test_16_characters_are_never_broken(client, tokenizer):
    # Equal biases make the bytes of an emoji likely in any order: whole ones, halves and nonsense come out.
    pieces = sorted({i for text in "🌟語é✨" for i in tokenizer.encode(text)})
    bias = {str(i): 30 for i in pieces}
    for seed in range(6):
        options = {"seed": seed, "max_tokens": 60, "logit_bias": bias, "extra_body": LONG, "prompt": ONCE}
        whole = complete(client, **options).choices[0].text
        chunks = [chunk.choices[0].text for chunk in complete(client, stream=True, **options)]
        assert "".join(chunks) == whole
        for chunk in chunks:
            chunk.encode()
    prompt = "🌟 語 é ✨ \U0001f469\u200d\U0001f680"
    assert complete(client, prompt, echo=True, max_tokens=0).choices[0].text == prompt


def test_17_two_hundred_impatient_clients_then_a_normal_one(slow_server):
    async def impatient() -> int:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=50), timeout=30) as http:

            async def one(i: int) -> int:
                body = {"prompt": ONCE, "max_tokens": 900, "stream": i % 2 == 0, **LONG}
                try:
                    sent = http.post(f"{slow_server.url}/v1/completions", json=body)
                    return (await asyncio.wait_for(sent, 0.5)).status_code
                except (httpx.TransportError, asyncio.TimeoutError):
                    return 0

            found: list[int] = []
            for start in range(0, 200, 50):
                found += await asyncio.gather(*(one(i) for i in range(start, start + 50)))
            assert set(found) <= {0, 200, 429}, set(found)
            return found.count(0)

    assert asyncio.run(impatient()) > 100, "most of them must have left early"
    written = tokens_written(slow_server)
    assert slow_server.client().completions.create(model="slow", prompt=ONCE, max_tokens=4).choices[0].text
    assert slow_server.idle()
    assert tokens_written(slow_server) - written < 900, "a text of a client that had left was written to its end"


def tokens_written(server: Server) -> float:
    return metric(server.get("/metrics").text, "smolforge_completion_tokens_total")


def leave(server: Server, body: dict, when) -> None:
    """Send a request, wait for a condition, and close the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_until(when, 20)


def figures(server: Server) -> tuple[float, float]:
    text = server.get("/metrics").text
    return metric(text, "smolforge_running"), metric(text, "smolforge_queue_length")


def test_18_leaving_the_queue_frees_the_place(slow_server):
    client = slow_server.client()
    others = [client.completions.create(model="slow", prompt=ONCE, max_tokens=800, stream=True, extra_body=LONG) for _ in range(2)]  # fmt: skip
    try:
        for other in others:
            next(iter(other))
        body = {"prompt": ONCE, "max_tokens": 900, **LONG}
        leave(slow_server, body, lambda: figures(slow_server) == (2, 1))
        wait_until(lambda: figures(slow_server)[1] == 0, 5)
        assert figures(slow_server)[0] == 2, "the others go on"
    finally:
        for other in others:
            other.close()
    assert slow_server.idle()


def test_19_leaving_while_the_prompt_is_read_frees_the_slot(slow_server):
    read = metric(slow_server.get("/metrics").text, "smolforge_prompt_tokens_total")
    written = tokens_written(slow_server)
    body = {"prompt": [5] * 1000, "max_tokens": 20, "n": 2, **LONG}
    leave(slow_server, body, lambda: metric(slow_server.get("/metrics").text, "smolforge_prompt_tokens_total") > read)
    assert slow_server.idle(5)
    assert tokens_written(slow_server) - written < 40, "it was not written to the end"


def test_20_leaving_a_whole_answer_frees_the_slot(slow_server):
    before = metric(slow_server.get("/metrics").text, "smolforge_requests_total", status="499")
    body = {"prompt": ONCE, "max_tokens": 900, "stream": False, **LONG}
    leave(slow_server, body, lambda: figures(slow_server)[0] == 1)
    assert slow_server.idle(5)
    text = slow_server.get("/metrics").text
    assert metric(text, "smolforge_requests_total", status="499") == before + 1


def test_21_sigterm_drains_tells_and_exits_0(slow_run):
    with serving(slow_run, "--drain-seconds", "1", "--no-page") as server:
        client = server.client()
        asked = {"model": "slow", "prompt": ONCE, "max_tokens": 40, "stream": True, "logprobs": 0, "extra_body": LONG}
        short, written = client.completions.create(**asked), 0
        long = client.completions.create(model="slow", prompt=ONCE, max_tokens=1000, n=4, stream=True, extra_body=LONG)
        next(iter(long))
        while written < 37:  # what is left fits into the time
            written += len(next(iter(short)).choices[0].logprobs.tokens)
        server.process.terminate()
        assert [c.choices[0].finish_reason for c in short][-1] == "length", "what fits into the time is finished"
        with pytest.raises(openai.APIError, match="shutting down"):
            list(long)
        assert server.process.wait(15) == 0
        with pytest.raises(httpx.ConnectError):
            server.get("/health")
        left = subprocess.run(["pgrep", "-g", str(server.process.pid)], capture_output=True, text=True)
        assert left.stdout == "", "a child is left"


def test_22_the_key(server):
    for key, word in ((None, "no API key"), ("wrong", "wrong API key")):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for path in ("/v1/models", "/metrics", "/page/state", "/v1/nothing"):
            response = httpx.get(server.url + path, headers=headers)
            assert response.status_code == 401 and word in response.json()["error"]["message"], path
            assert response.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    assert [model.id for model in server.client().models.list()] == [MODEL]
    assert httpx.get(f"{server.url}/health").status_code == 200, "health needs no key"


def test_23_page_assets_load_before_the_login(server):
    with httpx.Client(base_url=server.url, follow_redirects=True) as browser:
        page = browser.get("/")
        assert page.url.path == "/login" and page.status_code == 200 and MODEL in page.text
        for path in ("/page/static/login.css", "/page/static/main.js", "/page/static/uPlot.iife.min.js"):
            assert browser.get(path).status_code == 200, path
        wrong = browser.post("/login", data={"key": "open"})
        assert wrong.status_code == 401 and "not the key" in wrong.text and not browser.cookies
        assert browser.post("/login", data={"key": server.key}).url.path == "/"
        assert browser.get("/page/state").json()["model"] == MODEL
        cookie = next(iter(browser.cookies.jar))
        assert cookie.has_nonstandard_attr("HttpOnly") and "sesame" not in cookie.value
        assert browser.get("/").url.path == "/"


def test_24_metrics_count_what_happened(server, client):
    assert server.idle()
    before = server.get("/metrics").text
    complete(client, max_tokens=5, extra_body=LONG)
    list(complete(client, max_tokens=7, stream=True, n=2, extra_body=LONG))
    raw(server, prompt=[])
    raw(server, prompt=ONCE, model="other")
    server.get("/nothing")
    assert server.idle()
    after = server.get("/metrics").text

    def grew(name: str, **labels: str) -> float:
        return metric(after, name, **labels) - metric(before, name, **labels)

    assert grew("smolforge_requests_total", route="/v1/completions", status="200") == 2
    assert grew("smolforge_requests_total", route="/v1/completions", status="400") == 1
    assert grew("smolforge_requests_total", status="404") == 2
    assert grew("smolforge_completion_tokens_total") == 5 + 14
    assert grew("smolforge_prompt_tokens_total") == 8
    assert grew("smolforge_time_to_first_token_seconds_count") == 2
    assert metric(after, "smolforge_queue_length") == metric(after, "smolforge_running") == 0
    assert metric(after, "smolforge_up") == 1 and metric(after, "smolforge_cache_bytes", kind="budget") > 0


def test_25_the_second_server_on_a_port_says_so(server, tiny_run):
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "smolforge", "serve", str(tiny_run), "--port", port]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2 and f"port {port}" in second.stderr and "in use" in second.stderr
    assert "Traceback" not in second.stderr


def test_26_other_methods_and_routes_answer(server):
    for path in ("/", "/health", "/v1/models", "/metrics", "/openapi.json"):
        response = httpx.head(server.url + path, headers=server.headers)
        assert response.status_code == 200 and response.content == b"", path
    for path in ("/v1/completions", "/v1/models", "/health"):
        response = httpx.options(server.url + path, headers=server.headers)
        assert response.status_code == 204 and "OPTIONS" in response.headers["allow"]
    for method, path, status in (
        ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("PATCH", "/", 405), ("GET", "/v1/embeddings", 404),
        ("GET", "/gradio_api/file=/etc/passwd", 404), ("POST", "/gradio_api/upload", 404), ("GET", "/page/static/../app.py", 404),
        ("GET", "/page/static/%2e%2e%2fapp.py", 404), ("GET", "/gradio_api/proxy=http://localhost", 404), ("GET", "/docs", 404),
        ("BREW", "/v1/completions", 405),
    ):  # fmt: skip
        response = httpx.request(method, server.url + path, headers=server.headers)
        assert response.status_code == status, (method, path, response.text)
        assert response.headers["x-content-type-options"] == "nosniff"


def test_27_a_prompt_of_a_mebibyte_is_refused_without_a_step(server, client):
    assert server.idle()
    steps = metric(server.get("/metrics").text, "smolforge_step_seconds_count")
    with pytest.raises(openai.APIStatusError) as error:
        complete(client, "word " * (1 << 18))
    assert error.value.status_code == 413 and "bytes" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, "word " * 80_000)
    assert error.value.code == "context_length_exceeded"
    assert metric(server.get("/metrics").text, "smolforge_step_seconds_count") == steps
    assert complete(client).choices[0].text


def test_28_slow_clients_do_not_block_others(server, client):
    host, port = server.url.removeprefix("http://").split(":")
    slow = []
    for i in range(60):
        connection = socket.create_connection((host, int(port)))
        head = "POST /v1/completions HTTP/1.1\r\n" + (
            "" if i % 2 else f"Host: {host}:{port}\r\nContent-Length: 5000\r\n\r\n{{"
        )
        connection.sendall(head.encode())
        slow.append(connection)
    try:
        for _ in range(20):
            assert server.get("/health").status_code == 200
        assert complete(client).choices[0].text
    finally:
        for connection in slow:
            connection.close()
