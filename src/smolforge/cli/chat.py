"""smolforge chat: a conversation in the terminal, or one answer."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.cli.options import MODEL_HELP, add_inference, add_json, add_sampling, print_result, sampling_params
from smolforge.errors import BadInput, SmolforgeError, unknown
from smolforge.formatting import for_stdout, or_stdin, replace_lone_surrogates
from smolforge.generation import CHAT_SAMPLING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from smolforge.generation import Conversation

EXAMPLES = """\
examples:
  smolforge chat smollm2                            SmolLM2-135M-Instruct, fetched the first time
  smolforge chat smollm2 "What is the capital of France?" --json
  smolforge chat model.gguf --system "Answer in one sentence." --seed 1
  smolforge chat                                    the newest run in runs/
  git diff | smolforge chat smollm2 -               the question from stdin
"""
HELP = """\
/system TEXT       what the model is told first; empty for the template's own
/retry             answer the last question again
/undo              take the last question and its answer back
/save FILE         the conversation as JSON messages
/seed N            equal seeds give equal answers; /seed alone draws one for each
/temperature X     randomness; 0 always takes the likeliest token
/help  /exit       (or Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model that has a chat template. With a QUESTION it answers once.",
        epilog=f"{EXAMPLES}\nin a conversation:\n" + "\n".join(f"  {line}" for line in HELP.splitlines()),
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: the newest run in runs/)")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="answer this and exit; - reads it from stdin")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first (default: the template's own)")
    add_sampling(parser, **CHAT_SAMPLING, several=False)
    add_inference(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk."""
    from smolforge.generation import Conversation, Engine

    if args.json and args.question is None:
        raise BadInput("--json needs a QUESTION", field="--json", hint='smolforge chat MODEL "question" --json')
    sampling_params(args)  # an error now, not after the model is loaded
    if args.model is None:
        args.model = str(_newest_run(Path("runs")))
        print(f"model: {args.model}, the newest run here", file=sys.stderr)
    engine = Engine.from_pretrained(args.model, quantize=args.quantize, draft=args.draft, adapter=args.adapter)
    for decision in engine.decisions:
        print(decision, file=sys.stderr)
    system = None if args.system is None else replace_lone_surrogates(args.system)
    conversation = Conversation(engine, sampling_params(args, engine), system)
    if args.question is None:
        return _talk(conversation)
    question = or_stdin(args.question)
    text = "".join(_shown(conversation.ask(question), quiet=args.json))
    answer = conversation.answer
    outcome = {
        "model": str(engine.directory), "answer": text, "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens, "finish_reason": answer.finish_reason, "messages": conversation.messages,
    }  # fmt: skip
    if args.json:
        print_result(args, outcome, "")
    return 0


def _newest_run(folder: Path) -> Path:
    """The run in `folder` that wrote last."""
    from smolforge.run import Run

    runs = [Run(path) for path in folder.iterdir()] if folder.is_dir() else []
    found = [run for run in runs if run.exists and run.checkpoints_path.is_dir()]
    if not found:
        hint = "Name one, such as: smolforge chat smollm2"
        raise BadInput(f"there is no run in {folder.resolve()}", field="MODEL", hint=hint)
    return max(found, key=lambda run: run.checkpoints_path.stat().st_mtime).path


def _talk(conversation: Conversation) -> int:
    """Read turns until the end of the input."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # line editing and history; not on Windows
            import readline  # noqa: F401
        print("/help lists the commands, Ctrl-D leaves", file=sys.stderr)
    commands = _commands(conversation)
    while (line := _read_turn()) is not None:
        if not (line := replace_lone_surrogates(line)).strip():
            continue
        try:
            if not line.startswith("/"):
                _answer(conversation, conversation.ask(line))
                continue
            name, _, rest = line[1:].partition(" ")
            if name in ("exit", "quit", "bye"):
                break
            if name not in commands:
                raise unknown("command", f"/{name}", [f"/{known}" for known in (*commands, "exit")])
            commands[name](rest.strip())
        except SmolforgeError as error:
            print(f"error: {error}", file=sys.stderr)
    return 0


def _commands(conversation: Conversation) -> dict[str, Callable[[str], None]]:
    """What a line that begins with / does, by its first word."""
    from dataclasses import replace

    def system(text: str) -> None:
        conversation.set_system(text)
        print(f"system: {text or 'that of the template'}", file=sys.stderr)

    def undo(_: str) -> None:
        print(f"taken back: {conversation.undo()}", file=sys.stderr)

    def save(word: str) -> None:
        if not word:
            raise BadInput("give a file", hint="/save talk.json")
        try:
            Path(word).expanduser().write_text(
                json.dumps(conversation.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise BadInput(f"cannot write {word}: {error.strerror}") from None
        print(f"saved: {len(conversation.messages)} messages to {word}", file=sys.stderr)

    def setting(field: str, kind: type) -> Callable[[str], None]:
        def change(word: str) -> None:
            try:
                value = kind(word) if word else None
            except ValueError:
                raise BadInput(f"{word!r} is not a number", field=f"/{field}") from None
            if value is None and field != "seed":
                raise BadInput("give a number", hint=f"/{field} 0.2")
            conversation.params = replace(conversation.params, **{field: value})
            print(f"{field}: {'drawn for each answer' if value is None else value}", file=sys.stderr)

        return change

    return {
        "system": system, "retry": lambda _: _answer(conversation, conversation.retry()), "undo": undo, "save": save,
        "seed": setting("seed", int), "temperature": setting("temperature", float),
        "help": lambda _: print(HELP, file=sys.stderr),
    }  # fmt: skip


def _read_turn() -> str | None:
    """The next turn, or None at the end. Ctrl-C only drops the line."""
    lines: list[str] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and not lines else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)", file=sys.stderr)
            lines = []
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _answer(conversation: Conversation, text: Iterator[str]) -> None:
    """Show an answer while it is written; Ctrl-C stops it and keeps what was written."""
    import time

    began, stopped = time.monotonic(), False

    def stop(*_: Any) -> None:
        nonlocal stopped
        if stopped:  # the step itself does not end: leave
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        for _ in _shown(text):
            if stopped:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    text.close()  # type: ignore[attr-defined]
    answer, seconds = conversation.answer, time.monotonic() - began
    words = {"length": ", the maximum length was reached"}.get(answer.finish_reason or "", "")
    end = ", stopped" if stopped else words
    if sys.stdout.isatty():
        print(f"[{answer.tokens} tokens, {answer.tokens / seconds:.0f} per second{end}]", file=sys.stderr)


def _shown(text: Iterable[str], quiet: bool = False) -> Iterator[str]:
    """Pass the parts of an answer on and show them: as Markdown in a terminal, else as they are."""
    if quiet:
        yield from text
        return
    if not sys.stdout.isatty():
        for part in text:
            print(part, end="", flush=True)
            yield part
        print(flush=True)
        return
    from rich.console import Console

    view = MarkdownView(Console(highlight=False))
    try:
        for part in text:
            view.push(for_stdout(part))
            yield part
    finally:
        view.close()


class MarkdownView:
    """Markdown while it is written: finished blocks are printed for good, only the last one is drawn again."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console, self._rest = console, ""
        # Drawn at most ten times a second by its own thread; erased before a finished block is printed.
        self._live = Live(console=console, transient=True, refresh_per_second=10, vertical_overflow="crop")
        self._live.start()

    def push(self, text: str) -> None:
        """Add text."""
        from rich.markdown import Markdown

        self._rest += text
        done, self._rest = split_blocks(self._rest)
        if done:
            self._live.update("")
            self._console.print(Markdown(done))
        self._live.update(_LastRows(self._rest))

    def close(self) -> None:
        """Print what is left."""
        from rich.markdown import Markdown

        self._live.stop()
        if self._rest.strip():
            self._console.print(Markdown(self._rest))
        self._rest = ""


class _LastRows:
    """Markdown, of which the last rows that fit on the screen are drawn: more could not be erased."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markdown import Markdown
        from rich.segment import Segment

        rows = console.render_lines(Markdown(self.text), options.update(height=None), pad=False)
        for row in rows[-max(console.height - 2, 1) :]:
            yield from row
            yield Segment.line()


def split_blocks(text: str) -> tuple[str, str]:
    """The finished blocks of Markdown that is being written, and the rest: cut at the last blank line outside code."""
    cut, fence, at = 0, "", 0
    for line in text.splitlines(keepends=True):
        at += len(line)
        mark = line.lstrip()[:3]
        if mark in ("```", "~~~") and fence in ("", mark):
            fence = "" if fence else mark
        elif not fence and not line.strip() and line.endswith("\n"):
            cut = at
    return text[:cut], text[cut:]
