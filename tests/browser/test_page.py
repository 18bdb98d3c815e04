"""The page in a real browser: what a visitor does, and that nothing of it leaves the machine.

`test_screenshots` writes each state into /screenshots (kept out of git) for people to look at.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from urllib.parse import parse_qs

import pytest

from conftest import SHOTS, Visit, halted, never_end, open_tab, until, walk_tabs
from serving_fixtures import STEPS

ONCE = "Once upon a time"
DONE = "#text[aria-busy=false] .token"


def submit(visit: Visit, prompt: str = ONCE, tokens: int | None = None) -> None:
    page = visit.page
    page.fill("#prompt", prompt)
    if tokens is not None:
        page.fill("#max-tokens input[type=number]", str(tokens))
        page.press("#max-tokens input[type=number]", "Tab")
    page.click("#submit")


def write_on(visit: Visit) -> None:
    """Begin a text that goes on until it is stopped."""
    never_end(visit)
    submit(visit, "", tokens=1000)
    visit.page.wait_for_selector(".token >> nth=2")


def finished(visit: Visit) -> str:
    """The text, once it is written."""
    until(visit.page, "document.querySelector('.takes').textContent !== ''")
    visit.page.wait_for_selector("#text[aria-busy=false]")
    return written(visit)


def written(visit: Visit) -> str:
    """Prompt and tokens, without the word at the end."""
    return visit.page.evaluate(
        "[...document.querySelectorAll('#text .said, #text .token')].map((e) => e.textContent).join('')"
    )


def keep_seed(visit: Visit, seed: int) -> None:
    visit.page.fill("#seed", str(seed))
    visit.page.press("#seed", "Tab")
    visit.page.check("#keep")


def test_text_grows_and_shows_its_figures(visit):
    one = visit()
    keep_seed(one, 5)
    never_end(one)
    one.page.evaluate(
        "window.lengths = []; window.grown = []; let frame = 0;"
        "requestAnimationFrame(function next() { frame += 1; requestAnimationFrame(next); });"
        "new MutationObserver(() => {"
        "  window.lengths.push(document.querySelectorAll('.token').length);"
        "  window.grown[frame] = (window.grown[frame] ?? 0) + 1;"
        "}).observe(document.getElementById('text'), {childList: true, subtree: true})"
    )
    submit(one, tokens=400)
    text = finished(one)
    assert text.startswith(ONCE)
    lengths = [n for n in one.page.evaluate("window.lengths") if n]
    assert lengths == sorted(lengths) and len(set(lengths)) > 5, "the text is drawn as it is written"
    often = [count for count in one.page.evaluate("window.grown") if count and count > 1]
    assert len(often) <= 3, f"drawn several times in {len(often)} frames: the page lags behind a fast model"
    figures = one.page.inner_text(".figures")
    assert re.search(r"\d+ tokens · [\d.,]+ tokens/s · \d+ of 1,024 context · seed 5 · step 160", figures), figures


def test_stop_ends_the_writing_and_frees_the_slot(visit, page_server):
    one = visit()
    write_on(one)
    with halted(page_server):
        one.page.click("#stop")
        one.page.wait_for_selector("#text[aria-busy=false]")
    count = one.page.locator(".token").count()
    assert 0 < count < 1000
    assert page_server.idle(5)
    one.page.wait_for_timeout(300)
    assert one.page.locator(".token").count() == count
    assert one.page.inner_text(".end") == "stopped"


def test_clear_while_it_writes(visit, page_server):
    one = visit()
    write_on(one)
    with halted(page_server):
        one.page.click("#clear")
    assert page_server.idle(5)
    one.page.wait_for_timeout(100)
    assert one.page.locator(".token").count() == 0 and one.page.locator(".welcome").is_visible()


def test_the_same_seed_writes_the_same_text(visit):
    one = visit()
    submit(one)
    first = finished(one)
    seed = one.page.input_value("#seed")
    assert seed.isdigit(), "the drawn seed is shown"
    one.page.check("#keep")
    one.page.click("#regenerate")
    until(one.page, "document.querySelector('.takes').textContent === '2 of 2'")
    assert finished(one) == first
    one.page.uncheck("#keep")
    one.page.click("#regenerate")
    until(one.page, "document.querySelector('.takes').textContent === '3 of 3'")
    finished(one)
    assert one.page.input_value("#seed") != seed
    one.page.click("#back")
    assert written(one) == first


def test_alternatives_show_on_hover_and_branch_on_click(visit):
    one = visit()
    keep_seed(one, 7)
    submit(one)
    text = finished(one)
    tokens = one.page.locator(".token").all_text_contents()
    at = next(i for i, token in enumerate(tokens) if token.strip() in ("little", "brave", "sleepy", "clever"))
    one.page.hover(f".token >> nth={at}")
    choices = one.page.locator("#popover .choice")
    choices.first.wait_for()
    assert choices.count() == 5
    shares = [float(share.rstrip("%")) for share in one.page.locator("#popover .share").all_text_contents()]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.5
    other = one.page.locator("#popover .choice:not(:disabled)").first
    word = other.locator(".word").inner_text().replace("\u2423", " ")
    other.click()
    branch = finished(one)
    kept = ONCE + "".join(tokens[:at])
    assert branch.startswith(kept + word) and branch != text
    assert one.page.locator(".chosen").text_content() == word
    assert one.page.inner_text(".takes") == "2 of 2"


def test_branching_by_keyboard_alone(visit):
    one = visit()
    page = one.page
    page.focus("#prompt")
    page.keyboard.type(ONCE)
    page.keyboard.press("Control+Enter")
    finished(one)
    page.focus("#text")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className") == "choice"
    page.keyboard.press("Escape")
    assert page.locator("#popover").is_hidden()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.takes').textContent === '2 of 2'")
    finished(one)


def test_continue_copy_clear_and_examples(visit):
    one = visit()
    one.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = one.page
    for example in ("In the distant galaxy", ONCE):
        page.get_by_role("button", name=example).click()
        until(page, f"document.querySelector('#prompt').value === '{example}'")
        # An example puts the cursor behind its text a moment later; typing before that would end up in the prompt.
        until(page, "document.activeElement === document.querySelector('#prompt')")
    submit(one, tokens=6)
    short = finished(one)
    page.click("#continue")
    until(page, "document.querySelectorAll('.token').length > 6")
    longer = finished(one)
    assert longer.startswith(short) and len(longer) > len(short)
    page.click("#copy")
    until(page, "document.querySelector('#copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == longer
    page.click("#clear")
    page.wait_for_selector(".welcome")
    assert page.input_value("#prompt") == ""


def test_a_link_carries_prompt_and_settings(visit):
    one = visit("/#prompt=The+red+balloon&max_tokens=33&temperature=0.35&top_p=0.5&seed=12&keep=true&top_k=7")
    one.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = one.page
    until(page, "document.querySelector('#prompt').value === 'The red balloon'")
    assert page.input_value("#max-tokens input[type=number]") == "33"
    assert page.input_value("#temperature input[type=number]") == "0.35"
    assert page.input_value("#seed") == "12" and page.is_checked("#keep")
    page.click("#link")
    until(page, "document.querySelector('#link').textContent === 'Copied'")
    link = page.evaluate("navigator.clipboard.readText()")
    assert parse_qs(link.partition("#")[2]) == parse_qs(page.url.partition("#")[2])
    assert "#" in link and "prompt" not in link.partition("#")[0], "a prompt must not reach a server's log"
    page.click("#submit")
    text = finished(one)
    two = visit("/#" + link.partition("#")[2])
    until(two.page, "document.querySelector('#prompt').value === 'The red balloon'")
    two.page.click("#submit")
    assert finished(two) == text
    open_tab(one, "API")
    snippet = page.text_content("#snippet")
    for part in ('prompt="The red balloon"', "max_tokens=33", "temperature=0.35", "top_p=0.5", "seed=12", '"top_k": 7'):
        assert part in snippet, part


def test_the_snippet_runs_and_writes_what_the_page_wrote(visit):
    one = visit("/#prompt=Once+upon+a+time&max_tokens=9&seed=3&keep=true")
    until(one.page, f"document.querySelector('#prompt').value === '{ONCE}'")
    one.page.click("#submit")
    text = finished(one)
    open_tab(one, "API")
    code = one.page.text_content("#snippet")
    assert (
        ONCE + subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == text
    )
    one.page.get_by_role("button", name="curl").click()
    shell = subprocess.run(
        ["bash", "-c", one.page.text_content("#snippet")], capture_output=True, text=True, timeout=60
    )
    assert ONCE + json.loads(shell.stdout)["choices"][0]["text"] == text


def test_time_lapse_over_three_checkpoints(visit):
    one = visit()
    open_tab(one, "Time-lapse")
    one.page.wait_for_selector("#timelapse-start:not(:disabled)")
    one.page.click("#timelapse-start")
    one.page.wait_for_selector(f".card[data-step='{STEPS[-1]}'][data-state=done]", timeout=60_000)
    cards = one.page.locator("#cards .card")
    assert cards.count() == 3
    texts = cards.locator("p").all_text_contents()
    assert len(set(texts)) == 3 and all(text.startswith(ONCE) for text in texts)
    assert cards.locator("h3").all_text_contents() == [f"step {step}" for step in STEPS]


def test_training_tab_draws(visit):
    one = visit()
    open_tab(one, "Training")
    one.page.wait_for_selector("#charts canvas")
    titles = one.page.locator("#charts figcaption b").all_text_contents()
    assert titles == ["Loss", "Learning rate", "Tokens per second", "Gradient norm"]
    steps, raw, smooth, marks = one.page.evaluate("document.querySelector('#charts figure').plot.data")
    assert len(steps) == len(raw) == len(smooth) == STEPS[-1] and all(value > 0 for value in raw)
    assert sum(value is not None for value in marks) == 3, "the validations"
    inked = "(c) => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size > 9"
    assert all(one.page.evaluate(inked, canvas) for canvas in one.page.query_selector_all("#charts canvas"))
    one.page.hover("#charts .u-over >> nth=0")
    assert re.match(r"step \d+: ", one.page.inner_text("#charts .value >> nth=0"))
    assert one.page.locator("#samples .card").count() == 3
    assert "step 160" in one.page.inner_text("#run")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "width", "height"), [("desktop", 1440, 900), ("phone", 390, 844)])
def test_screenshots(visit, page_server, scheme, device, width, height):
    """Each state at both widths and in both schemes; nothing is wider than the window."""
    SHOTS.mkdir(exist_ok=True)
    touch = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2} if device == "phone" else {}
    one = visit(
        "/#prompt=Once+upon+a+time&seed=7&keep=true",
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        **touch,
    )
    page = one.page

    def shot(name: str) -> None:
        page.wait_for_timeout(250)
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{name} is {wide} px too wide"
        page.screenshot(path=SHOTS / f"{device}-{scheme}-{name}.png", full_page=name not in ("alternatives",))

    until(page, f"document.querySelector('#prompt').value === '{ONCE}'")
    shot("start")

    def choose(**values: str) -> None:
        for name, value in values.items():
            page.fill(f"#{name.replace('_', '-')} input[type=number]", value)
            page.press(f"#{name.replace('_', '-')} input[type=number]", "Tab")

    never_end(one)  # so that it can be seen writing
    choose(max_tokens="1000", temperature="2", top_p="1")
    page.click("#submit")
    page.wait_for_selector(".token >> nth=4")
    with halted(page_server):
        shot("writing")
        page.click("#stop")
        page.wait_for_selector("#text[aria-busy=false]")
    shot("stopped")
    page.unroute_all()
    choose(max_tokens="100", temperature="0.8", top_p="0.9")
    page.click("#submit")
    until(page, "document.querySelector('.takes').textContent === '2 of 2'")
    finished(one)
    shot("written")
    target = page.locator(".token >> nth=3")
    target.scroll_into_view_if_needed()
    if touch:
        target.tap()
    else:
        target.hover()
    page.wait_for_selector("#popover:not([hidden])")
    shot("alternatives")
    page.keyboard.press("Escape")
    walk_tabs(one, shot)
