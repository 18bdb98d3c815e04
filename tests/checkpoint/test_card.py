"""The card: true to the run, readable by the Hub, and the same for an interrupted run."""

from __future__ import annotations

from typing import Any

import yaml

from smolforge import config as configs
from smolforge.checkpoint.card import card_text
from smolforge.model.summary import count_parameters

ROWS: list[dict[str, Any]] = [
    {"step": 0, "tokens": 0, "validation": {"loss": 9.0, "perplexity": 8103.1, "bits_per_byte": 3.0}},
    {"step": 10, "tokens": 5120, "loss": 4.5, "time": 1.0, "tokens_per_second": 7},
    {"step": 10, "event": "resume"},
    {"step": 20, "tokens": 10_240, "loss": 3.25, "time": 2.0, "tokens_per_second": 9},
    {"step": 20, "tokens": 10_240, "validation": {"loss": 3.1234, "perplexity": 22.72, "bits_per_byte": 1.25},
     "entropy_bits_per_byte": 0.75},
    {"step": 30, "tokens": 15_360, "loss": None},
]  # fmt: skip


def front(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def make(*overrides: str) -> configs.RunConfig:
    return configs.build_config(None, ["data.sequence_length=512", "training.steps=100", *overrides])


def test_the_card_says_what_was_trained_on_what_and_how_well() -> None:
    text = card_text(
        make("data.sources={'Owner/name:part': 3, '/home/somebody/private/notes.txt': 1}"), step=20, rows=ROWS
    )
    assert front(text) == {
        "license": "unknown", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["smolforge", "pretrained", "base-model", "llama"], "datasets": ["Owner/name"],
    }  # fmt: skip
    assert "134,515,008 parameters" in text and "after step 20 of 100" in text
    assert "| `Owner/name:part` | 0.75 |" in text
    assert "| `.../notes.txt` | 0.25 |" in text and "somebody" not in text
    assert "| 20 | 10,240 | 3.2500 | 3.1234 | 22.7200 | 1.2500 |" in text
    assert "0.7500 bits per byte" in text
    for reader in ("AutoModelForCausalLM", "vllm serve", "llama-completion", "smolforge generate", "base model"):
        assert reader in text
    assert "{{" not in text and "{%" not in text


def test_neither_later_rows_nor_times_change_the_card() -> None:
    slower = [{**row, "time": 99.0, "tokens_per_second": 1} for row in ROWS[:-1] if "event" not in row]
    assert card_text(make(), step=20, rows=ROWS) == card_text(make(), step=20, rows=slower)


def test_the_license_is_the_owners() -> None:
    text = card_text(make(), step=0)
    assert front(text)["license"] == "unknown" and "has not chosen one: set `license`" in text
    assert "Nothing was logged" in text


def test_the_recreation_says_that_it_is_no_llama() -> None:
    text = card_text(make("model.architecture=recreation", "model.num_key_value_heads=9"), step=1)
    assert "This is not a Llama" in text
    assert "vllm" not in text and "AutoModel" not in text and "smolforge generate" in text
    assert front(text)["library_name"] == "smolforge" and "llama" not in front(text)["tags"]
    assert "134,411,328" in text


def test_long_curves_are_thinned_to_their_ends() -> None:
    rows = [{"step": step, "tokens": step, "loss": 1.0} for step in range(1, 500)]
    lines = [line for line in card_text(make(), step=499, rows=rows).splitlines() if line.endswith("– | – | – |")]
    assert len(lines) == 10
    assert lines[0].startswith("| 1 |") and lines[-1].startswith("| 499 |")


def test_continued_from_another_model() -> None:
    text = card_text(make("init=HuggingFaceTB/SmolLM2-135M"), step=1)
    assert front(text)["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "from the weights of `HuggingFaceTB/SmolLM2-135M`" in text


def test_parameters_are_counted_without_memory() -> None:
    shape = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192}
    assert count_parameters(configs.ModelConfig(**shape, num_hidden_layers=24)) == 1_711_376_384
