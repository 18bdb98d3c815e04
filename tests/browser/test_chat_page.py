"""The Chat tab in a real browser: a conversation, its branches, its storage, and Markdown that cannot do harm.

`test_screenshots` writes each state into /screenshots (kept out of git) for people to look at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SHOTS, Visit, halted, never_end, open_tab, until

# What a model could write to do harm, and what it usually writes.
MARKDOWN = """# Title

<script>window.harmed = 1</script><img src="x" onerror="window.harmed = 2">

Text with <b onclick="window.harmed = 3">tags</b>, **strong**, `code < 3`, [a link](https://example.org/a),
[a bad one](javascript:window.harmed=4), ![a picture](https://example.org/picture.png) and <https://example.org>.

<style>body { display: none }</style>

- [x] done
- [ ] to do

| a | b |
|:--|--:|
| 1 | <iframe src="https://example.org"></iframe> |

```python
def reverse(text: str) -> str:
    return text[::-1]  # <script>window.harmed = 5</script>
```

> quoted
"""


def asked(visit: Visit) -> list[dict]:
    """The bodies of the chat requests so far."""
    return visit.bodies


@pytest.fixture
def chat(visit_chat):
    """Opens the page on its Chat tab, with short answers; `bodies` are the requests that it makes."""

    def open_page(settings: bool = True, **context) -> Visit:
        one = visit_chat(**context)
        one.bodies = []
        one.page.on(
            "request",
            lambda request: (
                one.bodies.append(request.post_data_json) if request.url.endswith("/v1/chat/completions") else None
            ),
        )
        one.page.wait_for_selector("#question")
        if settings:
            choose(one, max_tokens="8", seed="3")
        return one

    return open_page


def choose(visit: Visit, **values: str) -> None:
    """Set settings of the conversation in the dialog."""
    page = visit.page
    page.click("#open-settings")
    if "top_k" in values:
        page.get_by_text("More settings").last.click()
    for name, value in values.items():
        field = {"max_tokens": "#chat-max-tokens", "seed": "#chat-seed", "system": "#system"}.get(
            name, f"#chat-{name.replace('_', '-')}-number"
        )
        page.fill(field, value)
        page.press(field, "Tab")
    page.get_by_role("button", name="Done").click()


def ask(visit: Visit, text: str) -> str:
    """Ask and wait for the answer."""
    visit.page.fill("#question", text)
    visit.page.press("#question", "Enter")
    return finished(visit)


def finished(visit: Visit) -> str:
    """The last answer, once it is written."""
    visit.page.wait_for_selector("#thread[aria-busy=false] .turn.assistant.last")
    return turns(visit)[-1]


def turns(visit: Visit) -> list[str]:
    """The texts of the turns that are shown."""
    return visit.page.locator(".turn .said-text").all_inner_texts()


def answer_with(visit: Visit, text: str) -> None:
    """Let the server's next answers be this text, in parts as a stream has them."""
    parts = [{"role": "assistant", "content": ""}, *({"content": text[i : i + 7]} for i in range(0, len(text), 7))]
    chunks = [{"choices": [{"index": 0, "delta": part, "finish_reason": None}]} for part in parts]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))


def test_five_turns_are_one_conversation_and_survive_a_reload(chat):
    one = chat()
    choose(one, system="Tell a tale.")
    questions = [f"Once upon a time, part {i}" for i in range(5)]
    answers = [ask(one, question) for question in questions]
    assert all(answers)
    for i, body in enumerate(asked(one)):
        told = [text for pair in zip(questions, answers, strict=True) for text in pair][: 2 * i + 1]
        sent = [message["content"] for message in body["messages"]]
        assert sent[0] == "Tell a tale." and sent[1::2] == told[::2] and len(sent) == len(told) + 1
        assert [message["role"] for message in body["messages"]][:3] == ["system", "user", "assistant"][: len(sent)]
    shown = turns(one)
    one.page.reload()
    one.page.wait_for_selector(".turn.assistant.last")
    assert turns(one) == shown and len(shown) == 10
    assert "8 tokens" in one.page.inner_text(".last .figures") and "tokens/s" in one.page.inner_text(".last .figures")
    assert one.page.inner_text(".pick[aria-current]") == questions[0]
    assert one.page.input_value("#system") == "Tell a tale."
    assert ask(one, "And then?")
    assert len(asked(one)[-1]["messages"]) == 12


def test_an_edited_question_and_a_retried_answer_are_branches(chat):
    one = chat()
    page = one.page
    for question in ("one", "two", "three"):
        ask(one, question)
    before = turns(one)
    page.locator(".turn.user").nth(1).get_by_role("button", name="Edit").click()
    page.fill(".edit", "zwei")
    page.press(".edit", "Enter")
    finished(one)
    assert [message["content"] for message in asked(one)[-1]["messages"]][::2] == ["one", "zwei"]
    assert turns(one)[:3] == [*before[:2], "zwei"] and len(turns(one)) == 4
    assert page.locator(".turn.user").nth(1).locator(".takes").inner_text() == "2 of 2"
    page.locator(".turn.user").nth(1).get_by_role("button", name="Earlier version").click()
    assert turns(one) == before, "the branch with all that was asked after it"
    page.locator(".turn.assistant").nth(0).get_by_role("button", name="Answer again").click()
    finished(one)
    body = asked(one)[-1]
    assert len(body["messages"]) == 1 and body["seed"] == asked(one)[0]["seed"] + 1 == 4
    assert page.locator(".turn.assistant .takes").inner_text() == "2 of 2" and len(turns(one)) == 2
    page.get_by_role("button", name="Earlier version").click()
    assert turns(one)[1] == before[1] and len(turns(one)) == 4, "the newest branch below it"


def test_escape_stops_and_continue_goes_on(chat, chat_server):
    one = chat(settings=False)
    page = one.page
    never_end(one)
    choose(one, temperature="2", top_p="1", max_tokens="900")
    page.fill("#question", "Ramble!")
    page.press("#question", "Enter")
    until(page, "document.querySelector('.turn.assistant .said-text').textContent.length > 20")
    with halted(chat_server):
        assert page.locator("#send").is_hidden()
        page.keyboard.press("Escape")
        text = finished(one)
    assert chat_server.idle(5)
    assert "stopped" in page.inner_text(".last .figures")
    page.reload()
    page.wait_for_selector(".turn.assistant.last")
    kept = page.evaluate("JSON.parse(localStorage.getItem(Object.keys(localStorage)[0])).turns[1].content")
    choose(one, max_tokens="5")
    page.get_by_role("button", name="Continue").click()
    finished(one)
    assert asked(one)[-1]["messages"][-1] == {"role": "assistant", "content": kept}
    longer = page.evaluate("JSON.parse(localStorage.getItem(Object.keys(localStorage)[0])).turns[1].content")
    assert longer.startswith(kept) and len(longer) > len(kept) and text
    assert page.locator(".turn.assistant").count() == 1


def test_a_page_closed_while_it_writes_keeps_what_was_written(chat):
    one = chat(settings=False)
    never_end(one)
    choose(one, temperature="2", top_p="1", max_tokens="900")
    one.page.fill("#question", "Ramble!")
    one.page.press("#question", "Enter")
    until(one.page, "document.querySelector('.turn.assistant .said-text').textContent.length > 20")
    one.page.reload()
    one.page.wait_for_selector(".turn.assistant.last")
    assert len(turns(one)[1]) > 20 and "stopped" in one.page.inner_text(".last .figures")


def test_only_what_the_user_changed_is_sent(chat):
    one = chat(settings=False)
    page = one.page
    assert page.input_value("#chat-temperature-number") == "0.6", "of the model's generation_config.json"
    assert page.input_value("#chat-top-p-number") == "0.95" and page.input_value("#chat-max-tokens") == "60"
    ask(one, "a")
    assert {"messages", "stream", "stream_options"} == set(asked(one)[-1])
    choose(one, temperature="0")
    ask(one, "b")
    assert asked(one)[-1]["temperature"] == 0 and "top_p" not in asked(one)[-1]
    page.click("#open-settings")
    page.click("#chat-temperature .reset")
    page.keyboard.press("Escape")
    ask(one, "c")
    assert "temperature" not in asked(one)[-1]
    open_tab(one, "Write")
    assert page.input_value("#temperature-number") == "0.6" and page.input_value("#top-p-number") == "0.95"
    with page.expect_request("**/page/write") as writing:
        page.click("#submit")
    assert set(writing.value.post_data_json) == {"prompt", "seed", "ids"}
    page.wait_for_selector("#text[aria-busy=false]")


def test_markdown_is_drawn_and_does_no_harm(chat):
    one = chat()
    one.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = one.page
    answer_with(one, MARKDOWN)
    text = ask(one, "Show me Markdown")
    assert "<script>window.harmed = 1</script>" in text and "<style>" in text, "tags are shown as they were written"
    body = page.locator(".turn.assistant .said-text")
    tags = set(body.evaluate("(e) => [...e.querySelectorAll('*')].map((x) => x.tagName)"))
    assert not tags & {"SCRIPT", "IMG", "STYLE", "IFRAME", "B", "INPUT"}
    assert {"H1", "STRONG", "CODE", "PRE", "TABLE", "UL", "BLOCKQUOTE"} <= tags
    links = body.evaluate("(e) => [...e.querySelectorAll('a')].map((a) => [a.getAttribute('href'), a.target, a.rel])")
    assert [href for href, _, _ in links] == [
        "https://example.org/a",
        None,
        "https://example.org/picture.png",
        "https://example.org",
    ]
    assert all(target == "_blank" and "noopener" in rel for href, target, rel in links if href)
    page.wait_for_timeout(300)
    assert page.evaluate("window.harmed") is None
    code = "def reverse(text: str) -> str:\n    return text[::-1]  # <script>window.harmed = 5</script>"
    assert body.locator("pre").inner_text() == code and body.locator(".code-head").inner_text().startswith("python")
    page.get_by_role("button", name="Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.locator(".turn.assistant").get_by_role("button", name="Copy this text").click()
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN
    page.reload()
    page.wait_for_selector(".turn.assistant pre")
    assert page.evaluate("window.harmed") is None


def test_several_conversations_are_kept_renamed_deleted_and_exported(chat):
    one = chat()
    page = one.page
    ask(one, "the first")
    page.keyboard.press("Control+Shift+O")
    assert turns(one) == []
    answer_with(one, "A *short* answer.")
    ask(one, "the second")
    assert page.locator(".pick").all_inner_texts() == ["the second", "the first"]
    page.fill("#conversation-title", "Zwei / 2")
    page.press("#conversation-title", "Enter")
    assert page.inner_text(".pick[aria-current]") == "Zwei / 2"
    with page.expect_download() as download:
        page.get_by_role("button", name="Markdown").click()
    assert download.value.suggested_filename == "Zwei-2.md"
    assert (
        Path(download.value.path()).read_text()
        == "# Zwei / 2\n\n## You\n\nthe second\n\n## Model\n\nA *short* answer.\n"
    )
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    found = json.loads(Path(download.value.path()).read_text())
    assert found["messages"] == [
        {"role": "user", "content": "the second"},
        {"role": "assistant", "content": "A *short* answer."},
    ]
    assert found["settings"] == {"seed": 3, "sampling": {"max_tokens": 8}} and found["model"] == "tales-chat"
    page.get_by_role("button", name="Delete “Zwei / 2”").click()
    assert page.locator(".pick").all_inner_texts() == ["the first"] and turns(one) == []
    page.get_by_role("button", name="Undo").click()
    assert turns(one)[0] == "the second" and page.locator(".pick").count() == 2
    page.get_by_role("button", name="the first", exact=True).click()
    assert turns(one)[0] == "the first"


def test_another_window_of_the_browser_is_followed(chat):
    one = chat()
    ask(one, "shared")
    second = one.context.new_page()
    second.goto(one.page.url)
    second.wait_for_selector("#question")
    second.get_by_role("button", name="shared", exact=True).click()
    second.fill("#question", "from the second window")
    second.press("#question", "Enter")
    one.page.wait_for_selector(".turn >> nth=3")
    wait = "document.querySelectorAll('.turn .said-text')[2].textContent === 'from the second window'"
    until(one.page, wait)


def test_storage_that_is_full_or_damaged_is_told_and_harms_nothing(chat):
    one = chat()
    page = one.page
    ask(one, "kept")
    page.evaluate("""() => {
        const prefix = `smolforge-chat ${location.pathname} `;
        localStorage.setItem(prefix + 'broken', '{"id": "bro');
        localStorage.setItem(prefix + 'odd', JSON.stringify({id: 'odd', title: 't', changed: 1, settings: {}, turns: [], last: 0}));
        localStorage.setItem('other', 'not ours');
    }""")
    page.reload()
    page.wait_for_selector(".turn.assistant.last")
    assert "2 conversations of this browser cannot be read" in page.inner_text("#chat-notice")
    page.get_by_role("button", name="Remove what is damaged").click()
    assert page.evaluate("Object.keys(localStorage).length") == 2 and page.locator("#chat-notice").is_hidden()
    page.evaluate("""() => {
        for (let size = 1 << 22; size >= 1; size = size >> 1)
            for (let i = 0; i < 3; i += 1) try { localStorage.setItem('fill' + size + i, 'x'.repeat(size)); } catch { break; }
    }""")
    ask(one, "no room")
    assert "used up" in page.inner_text("#chat-notice")
    assert turns(one)[2] == "no room" and len(turns(one)) == 4
    page.evaluate(
        "Object.keys(localStorage).filter((k) => k.startsWith('fill')).forEach((k) => localStorage.removeItem(k))"
    )
    ask(one, "room again")
    assert page.locator("#chat-notice").is_hidden()
    page.reload()
    page.wait_for_selector(".turn.assistant.last")
    assert len(turns(one)) == 6


def test_an_error_is_told_and_can_be_retried(chat):
    one = chat()
    page = one.page
    page.fill("#question", "word " * 3000)
    page.press("#question", "Enter")
    page.wait_for_selector(".turn.assistant .note.bad:not([hidden])")
    assert "1024" in page.inner_text(".turn.assistant .note.bad")
    one.errors.clear()  # the browser reports the 400 on its console, as it should
    page.keyboard.press("ArrowUp")  # in the empty field: edit the last question
    page.fill(".edit", "shorter")
    page.press(".edit", "Enter")
    assert finished(one)


def test_the_keyboard_reaches_everything(chat):
    one = chat()
    page = one.page
    page.focus("#question")
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    finished(one)
    assert asked(one)[0]["messages"][0]["content"] == "two\nlines"
    assert page.evaluate("document.activeElement.id") == "question"
    page.focus("#tab-chat")
    seen = []
    while len(seen) < 30 and (not seen or seen[-1] != "question"):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.textContent"
            )
        )
    assert seen == [
        "theme", "new-conversation", "two lines", "Delete “two lines”", "export-markdown", "export-json", "conversation-title", "open-settings",
        "thread", "Copy this text", "Edit this question and ask again", "Copy this text", "Answer again", "Continue this answer", "question",
    ]  # fmt: skip
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "system"
    assert "edit the last question" in page.text_content("#chat-settings")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"


def test_the_snippet_of_the_last_question_runs(chat):
    one = chat()
    choose(one, system="Be 'brief'.", top_k="9")
    text = ask(one, "Once upon a time")
    open_tab(one, "API")
    code = one.page.text_content("#snippet")
    assert '"top_k": 9' in code and "client.chat.completions.create" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == text.split() != [], done.stderr
    one.page.get_by_role("button", name="curl").click()
    done = subprocess.run(["bash", "-c", one.page.text_content("#snippet")], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].split() == text.split()


def test_without_a_template_the_page_only_writes(visit):
    one = visit()
    assert one.page.locator("#tab-chat").is_hidden() and one.page.locator("#write").is_visible()


def test_a_link_with_a_prompt_opens_the_write_tab(visit_chat):
    one = visit_chat("/llm/#prompt=Once")
    assert one.page.locator("#tab-chat").is_visible() and one.page.locator("#write").is_visible()
    assert one.page.input_value("#prompt") == "Once"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "width", "height"), [("desktop", 1440, 900), ("phone", 390, 844)])
def test_screenshots_and_accessibility(chat, chat_server, scheme, device, width, height):
    """Each state at both widths and in both schemes: nothing is wider than the window, and axe finds nothing."""
    axe = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js")
    SHOTS.mkdir(exist_ok=True)
    touch = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2} if device == "phone" else {}
    one = chat(
        settings=False,
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        reduced_motion="reduce",
        **touch,
    )
    page = one.page
    source = axe.read_text()

    def shot(name: str) -> None:
        page.wait_for_timeout(250)
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{name} is {wide} px too wide"
        page.screenshot(path=SHOTS / f"chat-{device}-{scheme}-{name}.png")
        page.evaluate(source)
        found = page.evaluate(
            "axe.run().then((r) => r.violations.map((v) => [v.id, v.impact, v.nodes.map((n) => n.html.slice(0, 150))]))"
        )
        assert found == [], f"{name}: {json.dumps(found, indent=1)}"

    def send(text: str) -> None:
        page.fill("#question", text)
        page.click("#send")

    shot("start")
    never_end(one)
    choose(one, temperature="2", top_p="1", max_tokens="900")
    send("Tell me a long story about a fox, please.")
    until(page, "document.querySelector('.turn.assistant .said-text').textContent.length > 60")
    with halted(chat_server):
        shot("writing")
        page.click("#stop-answer")
        finished(one)
    shot("stopped")
    page.unroute_all()
    answer_with(one, MARKDOWN)
    send("Now show me all of your Markdown.")
    finished(one)
    page.wait_for_selector(".turn.assistant pre")
    shot("markdown")
    page.locator(".turn.user").nth(1).get_by_role("button", name="Edit").click()
    shot("edit")
    page.keyboard.press("Escape")
    page.locator(".turn.assistant.last").get_by_role("button", name="Answer again").click()
    finished(one)
    shot("versions")
    page.click("#open-settings")
    page.locator("#chat-settings summary").nth(1).click()
    shot("settings")
    page.keyboard.press("Escape")
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send("Are you still there?")
    page.wait_for_selector(".turn.last .note.bad:not([hidden])")
    shot("problem")
    page.unroute_all()
    one.errors.clear()
    if device == "phone":
        page.click("#show-conversations")
    page.get_by_role("button", name="New conversation", exact=True).click()
    answer_with(one, "Paris.")
    send("What is the capital of France?")
    finished(one)
    if device == "phone":
        page.click("#show-conversations")
    shot("conversations")
