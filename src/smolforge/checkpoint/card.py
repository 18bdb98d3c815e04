"""The README of a checkpoint: what it is, what it was fed, how well it learned, how to load it, what not to expect.

A pure function of the configuration, the step and the logged rows up to it: no times, no machine, so that an
interrupted run writes the same card as one that was not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from smolforge.config import RunConfig, TokenizerConfig
from smolforge.formatting import count

if TYPE_CHECKING:
    from jinja2 import Template

    from smolforge.model.architecture import Architecture

_ROWS = 10
MAX_CARD = 1 << 20
# hf://datasets/OWNER/NAME... or OWNER/NAME:CONFIG; a local path of two parts has no colon.
_HUB_SOURCE = re.compile(r"^(?:hf://datasets/(?=[\w.-]+/)|(?=[\w.-]+/[\w.-]+(?:@[\w.-]+)?:))([\w.-]+/[\w.-]+)")


def card_text(config: RunConfig, *, step: int, rows: Iterable[dict[str, Any]] = ()) -> str:
    """The text of README.md, with the front matter that the Hub reads.

    Args:
        config: the run's configuration.
        step: the step of the checkpoint; rows of later steps are left out.
        rows: of metrics.jsonl.
    """
    from smolforge.model.architecture import architecture_of
    from smolforge.model.summary import count_parameters

    past = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= step]
    architecture, parameters = architecture_of(config.model), count_parameters(config.model)
    trained = "a byte-level BPE trained on the run's own data"
    total = sum(config.data.sources.values())
    return _template().render(
        front=_front_matter(config, architecture),
        title=f"{count(parameters)} language model, step {step:,}",
        config=config,
        architecture=architecture,
        parameters=parameters,
        origin=f"the weights of `{_public(config.init)}`" if config.init else "scratch",
        step=step,
        tokenizer=trained if isinstance(config.tokenizer, TokenizerConfig) else f"from `{_public(config.tokenizer)}`",
        sources=[(_public(source), weight / total) for source, weight in config.data.sources.items()],
        curve=_curve(past),
        entropy=next((_number(row["entropy_bits_per_byte"]) for row in past if row.get("entropy_bits_per_byte")), ""),
    )


def optimizer_of(directory: Path) -> str | None:
    """The optimizer that made the weights in a model directory, as its card says; None where it does not."""
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[:MAX_CARD] if card.is_file() else ""
    found = re.search(r"^\| optimizer \| (\w+),", text, re.MULTILINE)
    return found[1] if found else None


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    source = (resources.files("smolforge.checkpoint") / "templates" / "card.md.jinja").read_text(encoding="utf-8")
    # Markdown, not HTML: nothing is escaped, and the values are the user's own configuration.
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)


def _public(source: str) -> str:
    """A local path without the folders above it: a card is published, somebody's home directory need not be."""
    return f".../{PurePath(source).name}" if source.startswith(("/", "~")) else source


def _front_matter(config: RunConfig, architecture: Architecture) -> str:
    tag = architecture.model_type if architecture.in_transformers else "custom-architecture"
    front: dict[str, Any] = {
        "license": "unknown",  # only the owner of the run can say
        "library_name": "transformers" if architecture.in_transformers else "smolforge",
        "pipeline_tag": "text-generation",
        "tags": ["smolforge", "pretrained", "base-model", tag],
    }
    named = {match[1] for match in map(_HUB_SOURCE.match, config.data.sources) if match}
    if named:
        front["datasets"] = sorted(named)
    if config.init and re.fullmatch(r"[\w.-]+/[\w.-]+", config.init):
        front["base_model"] = config.init
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About ten lines of the curve: at the validations where there are any, evenly over the log else."""
    training = {row["step"]: row for row in rows if "loss" in row}
    validations = {row["step"]: row["validation"] for row in rows if isinstance(row.get("validation"), dict)}
    tokens = {row["step"]: f"{row['tokens']:,}" for row in rows if isinstance(row.get("tokens"), int)}
    steps = sorted(validations or training)
    if len(steps) > _ROWS:
        steps = [steps[round(i * (len(steps) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
    curve = []
    for step in steps:
        # A validation may fall on a step that was not logged: the last training loss before it is meant.
        logged = training.get(max((before for before in training if before <= step), default=-1), {})
        validation = validations.get(step, {})
        scores = {"validation": "loss", "perplexity": "perplexity", "bits": "bits_per_byte"}
        shown = {name: _number(validation.get(key)) for name, key in scores.items()}
        curve.append({"step": step, "tokens": tokens.get(step, ""), "loss": _number(logged.get("loss")), **shown})
    return curve


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "–"
