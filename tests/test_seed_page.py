"""docs/seed.md: every row has a command, every command is one that smolforge understands, every number is true."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from smolforge import cli
from smolforge import config as configuration
from smolforge.model import registry

PAGE = (Path(__file__).parents[1] / "docs" / "seed.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| the notebook says")
]
COMMANDS = sorted(set(re.findall(r"`(smolforge \w+ [^`]+)`", PAGE)))


def parse(command: str) -> argparse.Namespace:
    words = shlex.split(command)[1:]
    return cli.parser(verb=words[0]).parse_args(words)


def test_every_row_has_four_cells_and_ends_in_a_command() -> None:
    assert len(ROWS) > 15
    for row in ROWS:
        assert len(row) == 4, row
        assert re.fullmatch(r"`smolforge [^`]+`", row[3]), row[3]
        assert row[0] != "–" or row[1] != "–", "a row says something of the notebook or of its code"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command: str) -> None:
    args = parse(command)
    assert args.verb in cli.VERBS
    if args.verb == "train" and args.base not in (None, "pocket"):
        configuration.build(args.base, args.overrides)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("smolforge summary")])
def test_summaries_show_what_the_page_says(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(shlex.split(command)[1:]) == 0
    shown = capsys.readouterr().out
    wanted = "134411328" if "recreation" in command else "134515008"
    assert wanted in shown.replace(",", "")


def test_numbers_of_the_page() -> None:
    config = configuration.build("seed-recreation").model
    model = registry.build(config, device="meta", seed=None)
    dead = sum(
        config.num_attention_heads * (config.dim - config.kv_dim) * config.hidden_size * len(("q_proj", "o_proj"))
        for _ in model.model.layers
    )
    assert f"{dead:,} parameters, a tenth of the model" in PAGE
    assert 0.095 < dead / sum(p.numel() for p in model.parameters()) < 0.105
    assert f"columns {config.kv_dim + 1} to {config.dim} of every query" in PAGE
    for prompt in configuration.THREE_PROMPTS:
        assert prompt in PAGE
