"""The command line: a file per verb, and nothing heavy imported before the verb is known.

A verb's module has `add(verbs)`, which describes its arguments and names the function that runs it; that one imports
what it needs and returns an exit code. Results go to stdout, progress and logs to stderr; with `--json` stdout is one
JSON object.

    options.py       the parser, options that verbs share, how their values are read; words in any order
    train.py         start a run, or resume one
    sweep.py         the same run with other values, and which are best
    plan.py          what a run would take on other GPUs
    finetune.py      tune a model on conversations
    generate.py      continue prompts
    chat.py          a conversation in the terminal
    serve.py         a page and an OpenAI-compatible API
    eval.py          loss on a source, or lm-eval's tasks
    export.py        a model for other programs
    inspect.py       presets, the keys of a configuration, models, comparison of runs, verification of checkpoints
    data.py          which documents fed a step; the embedded corpus as a file
    doctor.py        what works on this machine
    completion.py    completion of words in a shell
    bench.py         speed on this machine; the kernels compiled for it ahead of time
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smolforge.errors import SmolforgeError

# Each verb and its module.
VERBS = {
    **{verb: verb for verb in ("train", "sweep", "plan", "finetune", "generate", "chat", "serve", "eval", "export")},
    **dict.fromkeys(("presets", "config"), "inspect"),
    **dict.fromkeys(("summary", "compare", "verify"), "inspect"),
    **{verb: verb for verb in ("data", "doctor", "completion")},
    **dict.fromkeys(("bench", "build-native"), "bench"),
}

# Keys of the configuration that options give under other names.
OPTIONS = {
    "data.sources": ("--data", "--calibration"), "training.steps": ("--steps",), "training.tokens": ("--tokens",),
    "training.epochs": ("--epochs",), "training.tokens_per_step": ("--batch-size",), "optimizer.lr": ("--lr",),
    "lora.r": ("--lora",),
}  # fmt: skip

DESCRIPTION = """\
Pretrain, resume, sample and serve your own SmolLM2-class language model.

  smolforge train                          a pocket model on the embedded corpus, in minutes on a laptop
  smolforge generate runs/pocket           generate with it
  smolforge chat smollm2                   talk to SmolLM2-135M-Instruct
  smolforge serve runs/pocket              a page and an OpenAI-compatible API
  smolforge train smollm2-135m             SmolLM2-135M on Cosmopedia-v2, streamed

Press Ctrl-C at any time: the run is saved, and the same command continues exactly where it stopped.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run a command line; its exit code. Errors that a user can meet are printed without a traceback."""
    # Waiting threads that spin make a busy machine crawl, so they sleep. But kernels and steps follow each other by the
    # hundred microseconds, and waking threads takes up to half of that: so they spin for about a millisecond first
    # (docs/log.md). All must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    # Large blocks on pages of 2 MiB: a twelfth of a training step went into pages of 4 KiB (docs/log.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from smolforge import limits, logging
    from smolforge.errors import SmolforgeError

    # A container that may use two of sixty CPUs is slowed down by sixty threads.
    if (quota := limits.cpu_quota()) and quota < len(limits.visible_cpus()):
        os.environ.setdefault("OMP_NUM_THREADS", str(limits.physical_cores(1)))

    logging.show()
    _take_any_bytes()
    args = parser(verb=argv[0] if argv else None).parse_args(argv)
    args.words = list(argv)
    if getattr(args, "device", None):
        os.environ["SMOLFORGE_DEVICE"] = args.device
    if args.verb is None:
        print(DESCRIPTION + "\nsmolforge --help lists all verbs.")
        return 0
    try:
        return args.run(args)
    except SmolforgeError as error:
        if not error.is_reported:
            name_options(error, args.words)
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output left, as `head` does; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _take_any_bytes() -> None:
    """Let no character that a terminal or a file cannot spell end a program in a traceback."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)


def name_options(error: SmolforgeError, words: Sequence[str]) -> None:
    """Let an error name the option where its field was given by one of a command line's words."""
    typed = {word.partition("=")[0] for word in words}
    for problem in getattr(error, "problems", [error]):
        options = OPTIONS.get(problem.field, (f"--{problem.field}".replace("_", "-"),))
        problem.field = next((option for option in options if option in typed), problem.field)


def parser(verb: str | None = None):
    """The parser of all verbs; only the file of `verb` is imported where it is one."""
    from smolforge.cli.options import Parser

    top = Parser(prog="smolforge", description=DESCRIPTION)
    top.add_argument("--version", action=_ShowVersion, nargs=0, help="show program's version number and exit")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for module in [VERBS[verb]] if verb in VERBS else dict.fromkeys(VERBS.values()):
        import_module(f"smolforge.cli.{module}").add(verbs)
    return top


class _ShowVersion(argparse.Action):
    # Unlike argparse's own action it reads the package's metadata only when asked: that is too slow for every start.
    def __call__(self, *_: object) -> None:
        from smolforge import __version__

        print(f"smolforge {__version__}")
        sys.exit(0)
