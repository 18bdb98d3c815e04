"""The page talks with the genuine SmolLM2-135M-Instruct; its answers are those of /v1/chat/completions."""

from __future__ import annotations

import httpx
import pytest

from conftest import visits
from serving_fixtures import serving

QUESTIONS = ("What is the capital of France?", "And of Italy?", "Write a Python function that reverses a string.")


@pytest.mark.slow
def test_the_page_answers_as_the_api_does(chromium, smollm2):
    with serving(smollm2, "--quantize", "fp32") as server, visits(chromium, server) as visit:
        page = visit().page
        page.click("#open-settings")
        page.fill("#chat-temperature-number", "0")
        page.fill("#chat-max-tokens", "80")
        page.press("#chat-max-tokens", "Tab")
        page.get_by_text("More settings").last.click()
        page.fill("#chat-repetition-penalty-number", "1")
        page.press("#chat-repetition-penalty-number", "Tab")
        page.get_by_role("button", name="Done").click()
        for question in QUESTIONS:
            page.fill("#question", question)
            page.press("#question", "Enter")
            page.wait_for_selector("#thread[aria-busy=false] .turn.assistant.last", timeout=60_000)
        keys = "Object.keys(localStorage).find((key) => key.startsWith('smolforge-chat'))"
        kept = page.evaluate(
            f"JSON.parse(localStorage.getItem({keys})).turns.map(({{role, content}}) => ({{role, content}}))"
        )
        assert [turn["content"] for turn in kept[::2]] == list(QUESTIONS)
        for end in (1, 3, 5):
            body = {"messages": kept[:end], "temperature": 0, "max_tokens": 80}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
            assert kept[end]["content"] == answer["choices"][0]["message"]["content"] != ""
        assert "Paris" in page.locator(".turn.assistant").first.inner_text()
