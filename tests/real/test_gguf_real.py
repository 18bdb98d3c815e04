"""The genuine SmolLM2-135M-Instruct as Q4_1: tokenizer, weights and text equal to Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from smolforge.checkpoint.format import read_config, read_generation_defaults
from smolforge.checkpoint.gguf import gguf_names
from smolforge.checkpoint.weights import read_weights
from smolforge.gguf_file import open_gguf
from smolforge.tokenizer import Tokenizer


def test_the_tokenizer_is_the_one_on_the_hub(smollm2: Path, real_data: Path) -> None:
    ours = Tokenizer.from_pretrained(smollm2)
    theirs = Tokenizer.from_pretrained(real_data / "tokenizer" / "smollm2-135m-instruct")
    lines = (real_data / "text" / "classic_books.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    lines += (real_data / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8").splitlines()[:2000]
    texts = [json.loads(line)["text"][:20_000] if line.startswith("{") else line for line in lines]
    assert ours.encode_batch(texts) == theirs.encode_batch(texts)
    assert ours.backend.get_vocab() == theirs.backend.get_vocab() and ours.special_ids == theirs.special_ids
    assert (ours.bos_id, ours.eos_id, ours.chat_template) == (theirs.bos_id, theirs.eos_id, theirs.chat_template)
    chat = [{"role": "user", "content": "What is <|im_end|>?"}]
    assert ours.encode_chat(chat) == theirs.encode_chat(chat)
    assert read_generation_defaults(smollm2) == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}


def test_the_shape_is_the_one_on_the_hub(smollm2: Path, real_data: Path) -> None:
    expected = json.loads((real_data / "config" / "smollm2-135m.json").read_text())
    config = read_config(smollm2).model_dump()
    assert {
        key: config[key] for key in config if key in expected and key not in ("initializer_range", "rms_norm_eps")
    } == {key: expected[key] for key in config if key in expected and key not in ("initializer_range", "rms_norm_eps")}


@pytest.mark.slow  # 20 s: transformers parses the vocabulary several times
def test_the_weights_are_what_transformers_decodes(smollm2: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ours = read_weights(smollm2)
    shape = load_gguf_checkpoint(str(smollm2))["config"]
    theirs = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    expected = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=theirs)["tensors"]
    assert set(ours) == set(expected) == set(gguf_names(read_config(smollm2)))
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert open_gguf(smollm2).type_name("blk.0.attn_q.weight") == "Q4_1"


PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "The sea", "In 1969,", "Water boils at", "My name is",
    "A recipe for bread:", "The theory of relativity", "import numpy as np", "Dear Sir,", "Question: What is gravity?", "1, 2, 3,",
    "Er war einmal", "She opened the door and", "The most important invention", "Cats are", "To be or not", "Photosynthesis is", "HTML",
]  # fmt: skip


@pytest.mark.slow  # a minute: a reference in fp32 for four thousand tokens
def test_the_file_run_as_it_is_writes_what_its_numbers_say(smollm2: Path, real_data: Path) -> None:
    from smolforge.checkpoint.locate import load_model
    from smolforge.evaluation import evaluate, evaluate_runner, tokenize_eval_set
    from smolforge.generation import Engine, SamplingParams
    from smolforge.generation.runners import select_runner

    module, tokenizer, _ = load_model(smollm2)
    engine = Engine.from_model(module, tokenizer, quantize="auto")
    assert "file" in engine.runner.name
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = [list(prompt) for prompt in prompts]
    for step in engine.stream(prompts, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)):
        texts[step.request] += [] if step.token_id is None else [step.token_id]
    ties: list[float] = []  # the margins of the tokens that the module would not write
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text) == len(prompt) + 200
        with torch.no_grad():  # the module's logits are transformers', see the test above and tests/model
            logits = module(torch.tensor([text[:-1]]))[0, len(prompt) - 1 :]
        best, written = logits.topk(2), torch.tensor(text[len(prompt) :])
        margins = best.values[:, 0] - best.values[:, 1]
        other = best.indices[:, 0] != written
        ties += margins[other].tolist()
    print(f"{len(ties)} of 4,000 tokens differ, with margins of", [round(margin, 5) for margin in ties])
    assert len(ties) <= 8 and max(ties, default=0) < 1e-3, "two tokens that are nearly as likely"
    lines = (real_data / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    piece = tokenize_eval_set([lines], tokenizer, 4000)
    expected, found = (
        evaluate(module, piece, length=1000, batch=1),
        evaluate_runner(select_runner(module)[0], piece, length=1000),
    )
    print(f"loss {found.loss:.6f}, of the decoded weights {expected.loss:.6f}")
    assert abs(found.loss - expected.loss) < 1e-4
