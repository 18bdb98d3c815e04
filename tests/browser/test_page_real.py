"""The page talks with the genuine SmolLM2-135M-Instruct; its answers are those of /v1/chat/completions."""

from __future__ import annotations

import json

import httpx
import pytest

from conftest import visits
from conversations import CASES, LENGTH
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


@pytest.mark.slow  # fifty answers, twice
def test_fifty_conversations_are_answered_as_by_the_api(chromium, smollm2):
    """The page finds each conversation in its storage, as after a reload, and asks the last question of it.

    `tests/real/test_chat_real.py` holds the API to transformers on the same conversations.
    """
    sampling = {"temperature": 0, "max_tokens": LENGTH, "repetition_penalty": 1}
    with serving(smollm2, "--quantize", "fp32") as server, visits(chromium, server) as visit:
        page = visit().page
        for number, messages in enumerate(CASES):
            system = "".join(message["content"] for message in messages if message["role"] == "system")
            turns = [{**turn, "parent": i - 1} for i, turn in enumerate(messages) if turn["role"] != "system"][:-1]
            kept = {"id": str(number), "title": "", "changed": number, "turns": turns, "last": len(turns) - 1,
                    "settings": {"system": system, "seed": None, "sampling": sampling}}  # fmt: skip
            page.evaluate(
                """([id, text]) => {
                    localStorage.clear();
                    localStorage.setItem(`smolforge-chat / ${id}`, text);
                    sessionStorage.setItem("smolforge-chat / open", id);
                }""",
                [str(number), json.dumps(kept)],
            )
            page.reload()
            page.wait_for_selector("#status.ready", state="attached")
            assert page.locator(".turn").count() == len(turns)
            page.fill("#question", messages[-1]["content"])
            page.press("#question", "Enter")
            page.wait_for_selector("#thread[aria-busy=false] .turn.assistant.last", timeout=60_000)
            found = page.evaluate(f"JSON.parse(localStorage.getItem('smolforge-chat / {number}')).turns.at(-1).content")
            body = {"messages": messages, "temperature": 0, "max_tokens": LENGTH}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
            assert found == answer["choices"][0]["message"]["content"] and found.strip(), messages
