"""What a model's own files say of its end tokens and of sampling."""

from __future__ import annotations

import json

import pytest
from tiny_llama import make_model

from smolforge import cli
from smolforge.checkpoint.format import write_model
from smolforge.errors import CheckpointError
from smolforge.generation import Engine, SamplingParams

OWN = {"temperature": 0.5, "top_p": 0.75, "top_k": 40, "repetition_penalty": 1.1, "max_new_tokens": 7}


@pytest.fixture
def directory(tmp_path, tokenizer):
    model = make_model()
    write_model(tmp_path, model.config, model.state_dict(), tokenizer)
    return tmp_path


def edit(directory, name, **values):
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_end_token_that_a_file_names_ends_a_text(directory, tokenizer):
    edit(directory, "generation_config.json", eos_token_id=[5, 6, -1, 9999])
    edit(directory, "config.json", eos_token_id=7)
    engine = Engine.from_pretrained(directory, quantize="fp32")
    assert sorted(engine.eos_ids) == [tokenizer.eos_id, 5, 6, 7]
    for token_id in (tokenizer.eos_id, 5, 6, 7):
        [*_, last] = engine.stream([[3]], SamplingParams(logit_bias={token_id: 100.0}, temperature=0))
        assert last.token_id == token_id and last.finish_reason == "stop"


def test_the_models_own_sampling_is_the_default_and_told(directory):
    edit(directory, "generation_config.json", **OWN)
    engine = Engine.from_pretrained(directory, quantize="fp32")
    own = SamplingParams(temperature=0.5, top_p=0.75, top_k=40, repetition_penalty=1.1, max_tokens=7)
    assert engine.params() == own
    assert engine.params(temperature=0.9, max_tokens=3) == SamplingParams(
        temperature=0.9, top_p=0.75, top_k=40, repetition_penalty=1.1, max_tokens=3
    )
    assert any("temperature 0.5" in line and "generation_config.json" in line for line in engine.decisions)
    assert engine.add([3]).params == own
    edit(directory, "generation_config.json", do_sample=False)
    greedy = Engine.from_pretrained(directory, quantize="fp32")
    assert greedy.params() == SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=7)


@pytest.mark.parametrize(
    ("field", "value"), [("repetition_penalty", 0), ("repetition_penalty", 0.001), ("top_p", 0), ("top_k", 2.5)]
)
def test_a_default_that_cannot_be_used_is_named_with_its_file(directory, field, value):
    edit(directory, "generation_config.json", **{field: value})
    with pytest.raises(CheckpointError) as caught:
        Engine.from_pretrained(directory)
    assert caught.value.field.endswith(f"generation_config.json: {field}")


def test_a_stop_string_that_is_a_special_token_ends_the_text(directory, tokenizer):
    engine = Engine.from_pretrained(directory, quantize="fp32")
    end = tokenizer.backend.token_to_id("<|im_end|>")
    params = SamplingParams(stop="<|im_end|>", logit_bias={end: 100.0}, temperature=0, max_tokens=5)
    [only] = engine.stream([[3]], params)
    assert (only.token_id, only.text, only.finish_reason) == (end, "", "stop")


def test_generate_takes_the_models_sampling_where_no_option_is_given(directory, capsys):
    def text(*options: str) -> str:
        assert cli.run(["generate", str(directory), "the fox", "--json", "--seed", "1", *options]) == 0
        return json.loads(capsys.readouterr().out)["completions"][0]["text"]

    options = ("--temperature", "0.5", "--top-p", "0.75", "--top-k", "40", "--max-tokens", "7")
    expected, plain = text(*options, "--repetition-penalty", "1.1"), text()
    edit(directory, "generation_config.json", **OWN)
    assert text() == expected != plain
    assert len(text("--max-tokens", "30")) > len(expected)
