"""The expected loss: a fit to the runs of docs/recipes.md, and what repeated text is worth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smolforge.config import build_config
from smolforge.training.forecast import forecast, parse_gpus
from smolforge.training.scaling_law import FIT, expected_bits, worth

RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_fit_says_what_the_runs_of_the_docs_measured() -> None:
    section = RECIPES.read_text().split("### What to expect")[1].split("\n#")[0]
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| (\d\.\d+) \|", section, re.MULTILINE)
    assert len(rows) >= 9
    for body, tokens, measured in rows:
        bits, error = expected_bits(*(float(number.replace(",", "")) for number in (body, tokens)))
        assert abs(bits - float(measured)) <= error


def test_more_parameters_and_more_tokens_are_expected_to_learn_more() -> None:
    sizes = [expected_bits(parameters, 1e6)[0] for parameters in (1e6, 4e6, 1e8)]
    lengths = [expected_bits(4e6, tokens)[0] for tokens in (2e5, 2e6, 1e9)]
    for series in (sizes, lengths):
        assert series[0] > series[1] > series[2] > FIT.e
    # SmolLM2-135M: two trillion tokens.
    assert expected_bits(106e6, 2e12)[0] == pytest.approx(1.18, rel=0.02)


def test_what_repeated_text_is_worth() -> None:
    assert worth(1e6, 1) == 1e6
    values = [worth(1e6 * epochs, epochs) for epochs in (1, 2, 4, 10, 100)]
    assert values == sorted(values) and values[1] > 1.9e6 and values[2] > 3.7e6
    assert values[-1] < 16.4e6, "more readings than about 16 are worth nothing"
    assert worth(5.0, 10.0) == pytest.approx(0.5 * worth(10.0, 10.0))


def test_a_plan_tells_the_expected_loss_of_new_weights_only() -> None:
    found = forecast(build_config("smollm2-135m", training={"tokens": "1B"}), *parse_gpus("H100"))
    (line,) = [line for line in found.lines() if line.startswith("expected: ")]
    bits, error = found.as_dict()["expected_bits_per_byte"]
    assert f"{bits:.2f} ± {error:.2f} bits per byte" in line
    continued = forecast(build_config("continue", init="smollm2", training={"tokens": "1B"}), *parse_gpus("H100"))
    assert continued.expected is None and not [line for line in continued.lines() if line.startswith("expected")]
