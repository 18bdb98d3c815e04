"""Tokenizers that begin a text with a token of their own, as those of Llama 2 and 3 do."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_llama import as_transformers, make_model
from tokenizers import processors

from smolforge import cli
from smolforge.checkpoint.format import write_model
from smolforge.evaluation import evaluate, evaluate_runner, tokenize_eval_set
from smolforge.generation import Engine, SamplingParams
from smolforge.generation.runners import select_runner
from smolforge.tokenizer import Tokenizer

BOS = "<|im_start|>"


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def llama(tokenizer):
    """A tokenizer whose post-processor adds BOS."""
    made = Tokenizer(type(tokenizer.backend).from_str(tokenizer.backend.to_str()), {"bos_token": BOS})
    made.backend.post_processor = processors.TemplateProcessing(single=[BOS, "$A"], special_tokens=[(BOS, made.bos_id)])
    return made


def test_a_prompt_begins_as_transformers_begins_it(llama, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    llama.save(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    for text in ("hello world", "", f"{BOS}user the fox"):
        assert ours.encode_prompt(text, special_tokens=True) in (theirs(text).input_ids, theirs(text).input_ids[1:])
    assert ours.prefix_ids == [ours.bos_id] and tokenizer.prefix_ids == []
    assert ours.encode_prompt("the fox") == [ours.bos_id, *ours.encode("the fox")]
    quoted = ours.encode_prompt(BOS)
    assert quoted[0] == ours.bos_id and ours.bos_id not in quoted[1:]
    assert ours.encode_prompt(f"{BOS}a", special_tokens=True).count(ours.bos_id) == 1
    assert ours.encode_prompt("the fox", prefix=False) == ours.encode("the fox") == ours.encode_batch(["the fox"])[0]


def test_a_tokenizer_that_also_ends_a_text_adds_no_end_to_a_prompt(llama):
    both = Tokenizer(type(llama.backend).from_str(llama.backend.to_str()), {"bos_token": BOS})
    both.backend.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A", "<|endoftext|>"], special_tokens=[(BOS, both.bos_id), ("<|endoftext|>", 0)]
    )
    assert both.encode_prompt("the fox") == [both.bos_id, *both.encode("the fox")]


def test_text_is_continued_after_the_token_that_begins_it(model, llama, tmp_path, capsys):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine = Engine.from_model(model, llama)
    assert engine.generate("the fox", params) == engine.generate([llama.bos_id, *llama.encode("the fox")], params)
    assert engine.add("").prompt == [llama.bos_id]
    write_model(tmp_path, model.config, model.state_dict(), llama)
    options = ["--temperature", "0", "--max-tokens", "8", "--quantize", "fp32", "--json"]
    assert cli.run(["generate", str(tmp_path), "the fox", *options]) == 0
    text = json.loads(capsys.readouterr().out)["completions"][0]["text"]
    assert text == engine.generate("the fox", SamplingParams(temperature=0, max_tokens=8))


def test_documents_are_scored_after_the_token_that_begins_them(model, llama):
    texts, nats, count = ["the quick brown fox", "hello world, once upon a time"], 0.0, 0
    theirs = as_transformers(model)
    for text in texts:
        ids = torch.tensor([[llama.bos_id, *llama.encode(text), llama.eos_id]])
        with torch.no_grad():
            logits = theirs(ids).logits
        nats += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    piece = tokenize_eval_set(texts, llama)
    assert len(piece.tokens) - 1 == count, "the token that begins a text is not predicted"
    for score in (
        evaluate(model, piece, length=64), evaluate_runner(select_runner(model, "fp32")[0], piece, length=64)
    ):  # fmt: skip
        assert score.loss == pytest.approx(nats / count, rel=1e-5)
