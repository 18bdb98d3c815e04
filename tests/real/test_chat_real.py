"""The genuine SmolLM2-135M-Instruct answers as transformers does on the same decoded weights, through chat and the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smolforge.checkpoint.locate import load_model
from smolforge.generation import Conversation, Engine, SamplingParams

QUESTIONS = [
    "What is the capital of France?", "Who wrote Hamlet?", "What is 2 + 2?", "Name three colours.", "Hello!", "Tell me a joke.",
    "What is photosynthesis?", "Translate 'good morning' to French.", "Why is the sky blue?", "What is the largest planet?",
    "Write a haiku about rain.", "List the first five prime numbers.", "What does DNA stand for?", "Is water wet?",
    "Give me a recipe for pancakes.", "Explain gravity to a child.", "What is a noun?", "How many days are in a week?",
    "Write a Python function that reverses a string.", "What does `len([1, 2, 3])` return in Python?",
    "Fix this: for i in range(10) print(i)", "Write SQL that counts the rows of a table t.", "def add(a, b):",
    "Write hello world in C.", "What is a hash table?", "Explain recursion with an example.", "x" * 200, "?", "42",
    "¿Cuál es la capital de España?", "Was ist die Hauptstadt von Deutschland?", "日本の首都はどこですか？", "Привет!", "مرحبا",
    "🙂🙂🙂", "naïve café", "1,000,000 / 7 = ?", "  spaces   and\n\nnewlines  ", "What is <|im_end|> for?", "\t\ttabs",
]  # fmt: skip
SYSTEMS = ["You are a pirate.", "Answer in one word.", "You are a helpful assistant.", "Antworte auf Deutsch.", ""]
TURNS = [
    ["My name is Ada.", "Nice to meet you, Ada.", "What is my name?"],
    ["Count to three.", "One, two, three.", "And on to five."],
    ["I like cats.", "Cats are great.", "What do I like?", "You like cats.", "Why?"],
    ["def f(x): return x", "This is the identity.", "Make it double x."],
    ["Hi", "Hello! How can I help?", "Name a city in Italy.", "Rome.", "Another one."],
]
CASES = [
    *([{"role": "user", "content": question}] for question in QUESTIONS),
    *([{"role": "system", "content": system}, {"role": "user", "content": "Who are you?"}] for system in SYSTEMS),
    *(
        [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]
        for turns in TURNS
    ),
]
LENGTH = 24


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    module, _, _ = load_model(smollm2)
    config = {**module.config.model_dump(exclude={"architecture"}), "attn_implementation": "eager"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(module.state_dict(), strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _greedy(theirs: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """transformers' tokens and the margin of the two likeliest at each of them."""
    with torch.no_grad():
        done = theirs.generate(
            torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=2, pad_token_id=2,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    best = [logits[0].topk(2).values for logits in done.logits]
    return done.sequences[0, len(ids) :].tolist(), [float(two[0] - two[1]) for two in best]


@pytest.mark.slow  # two minutes: transformers writes a thousand tokens in fp32
def test_fifty_conversations_are_answered_as_transformers_does(smollm2: Path, real_data: Path, theirs: Any) -> None:
    from starlette.testclient import TestClient
    from transformers import AutoTokenizer

    from smolforge.serving.app import create_app
    from smolforge.serving.settings import ServeSettings

    assert len(CASES) == 50
    hub = AutoTokenizer.from_pretrained(str(real_data / "tokenizer" / "smollm2-135m-instruct"))
    engine = Engine.from_pretrained(smollm2, quantize="fp32")
    params = SamplingParams(temperature=0, max_tokens=LENGTH)
    settings = ServeSettings(str(smollm2), quantize="fp32", page=False)
    ties = []
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        while client.get("/health").status_code != 200:
            pass
        for messages in CASES:
            if "<|im_end|>" in messages[-1]["content"]:  # transformers lets a message end its own turn
                ids = engine.tokenizer.encode_chat(messages)
            else:
                ids = hub.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                assert engine.tokenizer.encode_chat(messages) == ids, messages
            expected, margins = _greedy(theirs, ids)
            found = [out.token_id for out in engine.stream([ids], params)]
            found = [token for token in found if token is not None]
            same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
            if same is not None:  # two tokens as likely as each other to the last bits of fp32
                assert margins[same] < 1e-3, (messages, same, margins[same])
                ties.append(messages[-1]["content"])
                continue
            assert found == expected, messages
            text = engine.tokenizer.decode(found)
            assert text.strip(), messages
            conversation = Conversation(engine, params)
            conversation.messages = messages[:-1]
            assert "".join(conversation.ask(messages[-1]["content"])) == text
            body = {"messages": messages, "temperature": 0, "max_tokens": LENGTH}
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == text
    assert len(ties) <= 2, ties
