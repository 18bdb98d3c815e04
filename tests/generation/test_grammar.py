"""Constrained decoding: what a grammar describes is written, whatever the model, the sampling and the drafts."""

from __future__ import annotations

import json
import sys

import pytest
from tiny_llama import drop_kept, make_model

from smolforge.errors import BadInput
from smolforge.generation import Engine, SamplingParams
from smolforge.generation.grammar import closed

pytest.importorskip("llguidance", reason="the extra web is not installed")

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "naïve café 🙂"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
        "tags": {"type": "array", "items": {"const": "the"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["kind", "count", "sure", "tags"],
}


@pytest.fixture(scope="module", params=["int8", "live weights"])
def engine(request, tokenizer):
    quantize = None if request.param == "live weights" else request.param
    return Engine.from_model(make_model(), tokenizer, quantize=quantize)


def check(text: str) -> None:
    value = json.loads(text)
    assert list(value) == list(SCHEMA["properties"])
    assert value["kind"] in SCHEMA["properties"]["kind"]["enum"] and value["sure"] in (True, False)
    assert 0 <= value["count"] <= 99 and set(value["tags"]) == {"the"} and len(value["tags"]) <= 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0, "logit_bias": {0: 100.0}}, {"temperature": 1.5, "top_p": 1.0}, {"top_k": 1, "min_p": 0.9},
        {"typical_p": 0.2, "repetition_penalty": 3.0, "frequency_penalty": 2.0},
    ],
)  # fmt: skip
def test_every_text_is_json_of_the_schema(engine, settings) -> None:
    params = SamplingParams(grammar=engine.grammars.json_schema(SCHEMA), max_tokens=200, seed=3, n=2, **settings)
    texts, reasons = {}, {}
    for output in engine.stream(["the quick", [5, 6, 7]], params):
        key = output.request, output.index
        texts[key] = texts.get(key, "") + output.text
        reasons[key] = output.finish_reason
    assert len(texts) == 4 and set(reasons.values()) == {"stop"}
    for text in texts.values():
        check(text)


def test_requests_with_and_without_a_grammar_share_a_step(engine) -> None:
    free = SamplingParams(max_tokens=12, seed=1, temperature=0, ignore_eos=True)
    alone = engine.generate("hello", free)
    bound = SamplingParams(grammar=engine.grammars.json_schema(SCHEMA), max_tokens=200, seed=1)
    requests = [engine.add("hello", free), engine.add("once", bound)]
    texts = ["", ""]
    while engine.busy:
        for output in engine.step():
            texts[[request.id for request in requests].index(output.request)] += output.text
    assert texts[0] == alone
    check(texts[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing_and_are_accepted(tokenizer, temperature) -> None:
    engines = [Engine.from_model(make_model(), tokenizer, quantize="int8", speculate=on) for on in (True, False)]
    if engines[0].speculation is None:
        pytest.skip("no native code here, and the plain module is not bitwise the same in a batch")
    engines.append(Engine.from_model(make_model(), tokenizer, quantize="int8", draft=make_model()))
    schema = {"type": "array", "items": {"enum": ["the quick brown fox"]}, "minItems": 8, "maxItems": 8}
    texts = []
    for engine in engines:
        drop_kept(engine)
        params = SamplingParams(
            grammar=engine.grammars.json_schema(schema), max_tokens=200, seed=5, temperature=temperature
        )
        texts.append(engine.generate("hello", params))
    assert texts[0] == texts[1] == texts[2] == json.dumps(["the quick brown fox"] * 8)
    speculation = engines[0].speculation
    assert speculation.accepted > 10, "what repeats is guessed, by n-grams too"


def test_a_text_that_is_cut_off_says_so(engine) -> None:
    params = SamplingParams(grammar=engine.grammars.json_schema(SCHEMA), max_tokens=3, seed=1)
    outputs = list(engine.stream(["the"], params))
    assert outputs[-1].finish_reason == "length"


def test_a_grammar_that_cannot_be_followed_further_cuts_the_text_off(engine, caplog) -> None:
    properties = {f"k{i}": {"type": "string", "pattern": f"a{i}+"} for i in range(800)}
    grammar = engine.grammars.json_schema({"type": "object", "properties": properties})
    outputs = list(engine.stream(["the"], SamplingParams(grammar=grammar, max_tokens=50, seed=1)))
    assert outputs[-1].finish_reason == "length"
    assert "cut off" in caplog.text and "k17" not in caplog.text, "the log holds no schema"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nope"}, "nope"), ({"type": "string", "pattern": "(?=x)"}, "look-ahead"),
        ({"$ref": "https://example.com/x"}, "registry"), ({"enum": []}, "schema"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused(engine, schema, words) -> None:
    with pytest.raises(BadInput, match=words) as error:
        engine.grammars.json_schema(schema, field="text.format")
    assert error.value.field == "text.format"


def test_the_grammar_says_where_the_text_ends(engine) -> None:
    grammar = engine.grammars.json_schema(SCHEMA)
    for wrong in ({"ignore_eos": True}, {"min_tokens": 2}):
        with pytest.raises(BadInput, match="where the text ends"):
            SamplingParams(grammar=grammar, **wrong)


def test_without_the_package_one_error_names_the_extra(tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = Engine.from_model(make_model(), tokenizer)
    with pytest.raises(BadInput, match="llguidance") as error:
        engine.grammars.json_schema(SCHEMA)
    assert error.value.field == "response_format" and "smolforge[web]" in str(error.value)
    assert engine.generate("the", SamplingParams(max_tokens=8, seed=1, ignore_eos=True))


def test_objects_get_no_other_keys_unless_the_schema_has_them() -> None:
    inner = {"type": "object", "properties": {"properties": {"type": "string"}}}
    assert closed(inner) == {**inner, "additionalProperties": False}
    assert closed({"anyOf": [inner, {"type": "null"}]})["anyOf"][0]["additionalProperties"] is False
    assert closed({"$defs": {"properties": inner}})["$defs"]["properties"]["additionalProperties"] is False
    for kept in (
        {"allOf": [inner, inner]}, {**inner, "additionalProperties": True}, {"enum": [inner]},
        {**inner, "patternProperties": {"^x": {}}}, {"type": "object"},
    ):  # fmt: skip
        assert closed(kept) == kept
