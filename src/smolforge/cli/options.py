"""The parser, the options that several verbs share, how their values are read, and the words of a line in any order.

argparse wants the words that belong to no option together, and gives an option that takes several words all that
follow. So the words are sorted before it reads them, as in `generate RUN --seed 7 "Once"` or `eval --data a b MODEL`.
`--model` and `--prompt` are other names for the places of MODEL (of `train` the preset) and PROMPT.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from smolforge.errors import BadInput, nearest

if TYPE_CHECKING:
    from smolforge.generation import Engine, SamplingParams

MODEL_HELP = (
    "a run (its newest checkpoint; RUN/average are its averaged weights), a checkpoint, a model directory, "
    "a .gguf file, a Hub id or hf://OWNER/REPO/FILE.gguf"
)
PRECISIONS = ("fp32", "bf16", "int8", "int4")
MODEL_PLACES, PROMPT_PLACES = ("model", "base", "preset"), ("prompts", "question")


class Parser(argparse.ArgumentParser):
    """argparse with exact option names, examples kept as written, and a suggestion for a mistyped word."""

    def __init__(self, **settings: object) -> None:
        settings.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, the message, and the command that lists the options."""
        options = [name for action in self._actions for name in action.option_strings]
        choices = [str(c) for a in self._actions if isinstance(a, argparse._SubParsersAction) for c in a.choices]
        guess, message = None, message.removeprefix("argument ")
        if message.startswith("unrecognized arguments:"):
            word = message.split(":", 1)[1].split()[0]
            guess = nearest(word.split("=")[0], options) if word.startswith("-") else None
        elif "invalid choice:" in message:
            guess = nearest(message.split("'")[1], choices)
            message = message.split(" (choose from")[0] if choices else message  # the help lists them
        hint = f"Did you mean {guess}? " if guess else ""
        print(f"error: {message}\n  {hint}`{self.prog} --help` lists the options.", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse, for words in any order."""
        return super().parse_known_args(arrange(self, sys.argv[1:] if args is None else args), namespace)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse, but unknown words are reported by the verb they were given to."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            verbs = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
            verb = verbs[0].choices.get(found.verb) if verbs and found.verb else None
            (verb or self).error(f"unrecognized arguments: {' '.join(rest)}")
        return found


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an option that takes whole numbers from `least` on."""

    def whole(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    whole.__name__ = "int"  # as argparse calls it for a text that is not a number
    return whole


positive = at_least(1)


def above_zero(text: str) -> float:
    """The `type` of an option that takes a number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def add_numbers(parser: Any, kind: type, metavar: str, *options: tuple[str, Any, str]) -> None:
    """Add options that take a number: (name, default, help). The help text says the default where there is one."""
    for name, default, text in options:
        shown = text if default is None else f"{text} (default {default:g})"
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=shown)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, which `cli.run` hands on as SMOLFORGE_DEVICE."""
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:N or mps (default: a GPU of CUDA where one works)"
    )


def add_run(parser: argparse.ArgumentParser, *, out: str, setting: str) -> None:
    """Options of the verbs that train: where the run is, whether it may exist, settings, time limit, processes.

    Args:
        out: the default directory, as the help names it.
        setting: an example of a setting, for the help.
    """
    parser.add_argument("--out", type=Path, metavar="RUN", help=f"directory of the run (default: {out})")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="fail if there is no run to resume")
    again.add_argument("--fresh", action="store_true", help="start over; an earlier run is moved aside")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help=f"any key of the configuration, e.g. {setting} (may be repeated)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="tell every decision, and stop before the first step")
    parser.add_argument("--time-limit", metavar="TIME", help="save and stop after this time: 90m, 3h50m, 1:30:00")
    parser.add_argument(
        "--nproc", metavar="N|auto", help="processes on this machine (default auto: one for each GPU, else one)"
    )


def add_usual(parser: argparse.ArgumentParser, *, epochs: str, lr: str, batch: str, length: Any = None) -> None:
    """Add the settings that other trainers have as options; the texts say what holds where one is not given.

    Args:
        length: the group of options of which only one may give the length of a run.
    """
    (length or parser).add_argument("--epochs", type=float, metavar="X", help=f"passes through the data ({epochs})")
    parser.add_argument("--lr", type=float, metavar="X", help=f"peak learning rate ({lr})")
    parser.add_argument("--batch-size", metavar="N", help=f"windows in one update ({batch})")


def usual_layers(args: argparse.Namespace) -> dict[str, Any]:
    """The sections that `--epochs` and `--lr` set; BadInput where one is not above 0."""
    for name, value in (("--epochs", args.epochs), ("--lr", args.lr)):
        if value is not None and not value > 0:
            raise BadInput(f"{value} must be above 0", field=name)
    layers: dict[str, Any] = {}
    if args.epochs is not None:
        layers["training"] = {"epochs": args.epochs}
    if args.lr is not None:
        layers["optimizer"] = {"lr": args.lr}
    return layers


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add `--adapter`."""
    parser.add_argument(
        "--adapter", metavar="DIR", help="merge this adapter into MODEL: a LoRA run, or what peft wrote"
    )


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model that generates: precision, adapter, draft model and device."""
    parser.add_argument(
        "--quantize", default="auto", choices=("auto", "none", *PRECISIONS),
        help="precision of the weights (default: the fastest that keeps the quality)",
    )  # fmt: skip
    add_adapter(parser)
    parser.add_argument(
        "--draft", metavar="DRAFT_MODEL",
        help="a smaller model with the same tokenizer for speculative decoding; the output stays the same",
    )  # fmt: skip
    add_device(parser)


def add_sampling(
    parser: argparse.ArgumentParser,
    *,
    max_tokens: int = 100,
    temperature: float = 0.8,
    repetition_penalty: float = 1.0,
    several: bool = True,
) -> None:
    """Add the sampling options with these defaults; `several`: whether a prompt may have several continuations."""
    integer = (
        ("--max-tokens", max_tokens, "maximum number of new tokens"),
        ("--top-k", 0, "choose only among the K likeliest tokens; 0 for all"),
        *([("--n", 1, "continuations of each prompt")] if several else []),
        ("--seed", None, "equal seeds give equal texts (default: random)"),
    )
    real = (
        ("--temperature", temperature, "randomness; 0 always takes the likeliest token"),
        ("--top-p", 0.9, "choose only among the likeliest tokens that add up to this probability"),
        ("--min-p", 0.0, "drop tokens less likely than this share of the likeliest one"),
        ("--repetition-penalty", repetition_penalty, "above 1 makes repetition less likely"),
    )
    add_numbers(parser, int, "N", *integer)
    add_numbers(parser, float, "X", *real)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be repeated)"
    )
    # The help names the defaults, but a value that is not given can also come from the model's generation_config.json.
    names = [name.lstrip("-").replace("-", "_") for name, _, _ in (*integer, *real)]
    verb = {"max_tokens": max_tokens, "temperature": temperature, "repetition_penalty": repetition_penalty}
    parser.set_defaults(**dict.fromkeys(names), sampling=verb)


def sampling_params(args: argparse.Namespace, engine: Engine | None = None) -> SamplingParams:
    """The parameters of `add_sampling`'s options; those not given are the model's own or the verb's."""
    from smolforge.generation import SamplingParams

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "n")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    own = engine.defaults if engine is not None else {}
    return SamplingParams(**{**args.sampling, **own, **given}, stop=tuple(args.stop))


def refuse_others(args: argparse.Namespace, only: Mapping[str, tuple[str, ...]], flag: str, asked: str) -> None:
    """BadInput for an option of other goals than `asked`; `only` has those of each, and `flag` stands before a goal."""
    for option, goals in only.items():
        if getattr(args, option) is not None and asked not in goals:
            problem = f"is an option of {flag}{' and '.join(goals)}, not of {flag}{asked}"
            raise BadInput(problem, field=f"--{option.replace('_', '-')}")


def print_result(args: argparse.Namespace, outcome: dict[str, Any], text: str) -> None:
    """Print the result of a verb on stdout: one JSON object with `--json`, else the text."""
    print(json.dumps(outcome, ensure_ascii=False) if args.json else text)


def parse_sources(words: list[str], field: str = "--data") -> dict[str, float]:
    """`A=0.7` → {A: 0.7}; a source without a weight weighs 1.

    A path that exists is a source as it stands, so `--data year=2024` reads that folder, and so is an address with a
    query, as signed ones are.

    Raises:
        BadInput: a source is named twice.
    """
    sources: dict[str, float] = {}
    for word in words:
        name, equals, weight = word.rpartition("=")
        is_source = re.match(r"https?://.*\?", word) or Path(word).expanduser().exists()
        weighted = bool(equals) and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", weight) and not is_source
        source = name if weighted else word
        if source in sources:
            raise BadInput(f"{source} is given twice", field=field)
        sources[source] = float(weight) if weighted else 1.0
    return sources


def parse_positive(text: str, field: str) -> int:
    """`64k` → 64000; at least 1."""
    from smolforge.config import parse_count

    try:
        value = parse_count(text)
    except ValueError as error:
        raise BadInput(str(error), field=field) from None
    if value < 1:
        raise BadInput(f"{text!r} must be at least 1", field=field)
    return value


def parse_step_range(text: str, field: str) -> tuple[int, int]:
    """`3:5` → (3, 5); the first must be the smaller, and steps count from 1."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) < int(match[2]):
        hint = "Write A:B with A < B; B itself is kept, and the first step is 1."
        raise BadInput(f"{text!r} is not a range of steps", field=field, hint=hint)
    return int(match[1]), int(match[2])


def parse_seconds(text: str, field: str) -> float:
    """Seconds of a duration: `90m`, `3h50m`, `1:30:00`, or a number of seconds."""
    colons = re.fullmatch(r"(?:(\d+):)?(\d+):(\d+)", text)
    if colons:
        return int(colons[1] or 0) * 3600 + int(colons[2]) * 60 + int(colons[3])
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not text or not parts:
        raise BadInput(f"{text!r} is not a duration", field=field, hint="Write 90m, 3h50m, 1:30:00 or seconds.")
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def arrange(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The same words, options first and then, behind `--`, those that belong to none."""
    places = [action for action in parser._actions if not action.option_strings]
    if not places or any(isinstance(place, argparse._SubParsersAction) for place in places):
        return list(words)
    sorter = _Sorter(parser, places, list(words))
    while sorter.words:
        sorter.next()
    own = sorter.placed()
    return [*sorter.options, "--", *own] if own else sorter.options


class _Sorter:
    def __init__(self, parser: argparse.ArgumentParser, places: list[argparse.Action], words: list[str]) -> None:
        self.parser, self.places, self.words = parser, places, words
        self.options: list[str] = []
        self.own: list[str] = []
        self.model: list[str] = []
        self.prompts: list[str] = []
        self.several = range(0)  # places in `options` of the words that an option of several took last

    def next(self) -> None:
        """Sort the next word, with the values where it is an option."""
        word = self.words.pop(0)
        name, equals, value = word.partition("=")
        action = self.parser._option_string_actions.get(name)
        named = self._named(name) if action is None else None
        if word == "--":
            self.own += self.words
            self.words.clear()
        elif named is not None:
            if not equals and not self.words:
                self.parser.error(f"argument {name}: expected one argument")
            named.append(value if equals else self.words.pop(0))
        elif action is None and not (word.startswith("-") and len(word) > 1):
            self.own.append(word)
        else:
            self.options.append(word)
            if action is not None and not equals:
                self._take(action)

    def _named(self, name: str) -> list[str] | None:
        """Where the value of `--model` or `--prompt` goes, in verbs that have its place."""
        if name == "--model" and self.places[0].dest in MODEL_PLACES:
            return self.model
        return self.prompts if name == "--prompt" and self.places[-1].dest in PROMPT_PLACES else None

    def _take(self, action: argparse.Action) -> None:
        """Take the values of an option."""
        if action.nargs in (None, 1):
            self.options += self.words[:1]
            del self.words[:1]
            return
        if action.nargs not in ("?", "+", "*"):
            return
        start = len(self.options)
        while self.words and _fits(action, self.words[0]) and (action.nargs != "?" or len(self.options) == start):
            self.options.append(self.words.pop(0))
        if action.nargs != "?":
            self.several = range(start, len(self.options))

    def placed(self) -> list[str]:
        """The words that belong to no option; a missing one is the last that an option of several took."""
        own = [*self.model, *self.own]
        if self.prompts and len(self.places) > 1 and not own:
            self.parser.error(f"--prompt needs {self.places[0].metavar} too")
        needed = sum(place.nargs in (None, "+") for place in self.places)
        is_name = getattr(self.places[0], "is_name", None)
        if len(self.several) > 1 and (
            len(own) < needed or (not own and is_name and is_name(self.options[self.several[-1]]))
        ):
            own.append(self.options.pop(self.several[-1]))
        return [*own, *self.prompts]


def _fits(action: argparse.Action, word: str) -> bool:
    """Whether a word can be a value of an option that takes several or none."""
    if word.startswith("-") and len(word) > 1:
        return False
    if action.choices is not None:
        return word in action.choices
    try:
        return not callable(action.type) or action.type(word) is not None
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
