"""smolforge completion: a script with which a shell completes verbs, options, presets and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
# Arguments that files and directories answer: models, sources, places to write to.
PATHS = ("adapter", "calibration", "data", "draft", "html", "init", "model", "path", "runs", "sources", "tokenizer")
EXAMPLES = """\
examples:
  smolforge completion bash > ~/.local/share/bash-completion/completions/smolforge
  smolforge completion zsh > ~/.zfunc/_smolforge        (with `fpath+=~/.zfunc` before compinit in ~/.zshrc)
  smolforge completion fish > ~/.config/fish/completions/smolforge.fish
"""


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "completion",
        help="completion of words in a shell",
        description="Print a script with which a shell completes verbs, options, presets and files.",
        epilog=EXAMPLES,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script. It holds all words, so completing starts no Python."""
    import shtab

    from smolforge import cli
    from smolforge.config import preset_names

    parser = cli.parser()
    for action in _actions(parser):
        if action.dest in ("base", "preset"):
            files = shtab.Required.FILE if args.shell == "bash" else []  # elsewhere words and files do not mix
            action.choices = [*preset_names(), *files]
        elif action.dest in PATHS or action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)
