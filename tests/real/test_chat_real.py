"""The genuine SmolLM2-135M-Instruct answers as transformers does on the same decoded weights, through chat and the API.

`tests/browser/test_page_real.py` holds the page to the API on the same conversations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conversations import CASES, LENGTH
from smolforge import cli
from smolforge.checkpoint.locate import load_model
from smolforge.generation import Conversation, Engine, SamplingParams


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


def _told(engine: Engine, messages: list[dict[str, str]], capsys: pytest.CaptureFixture[str]) -> str:
    """The answer of `smolforge chat`: of its one question, or in a conversation that has begun."""
    *before, last = messages
    if len(before) > 1:
        conversation = Conversation(engine, SamplingParams(temperature=0, max_tokens=LENGTH))
        conversation.messages = before
        return "".join(conversation.ask(last["content"]))
    words = [
        "chat",
        "smollm2",
        last["content"],
        "--json",
        "--quantize",
        "fp32",
        "--temperature",
        "0",
        "--max-tokens",
        str(LENGTH),
    ]
    words += ["--repetition-penalty", "1", *(word for message in before for word in ("--system", message["content"]))]
    capsys.readouterr()
    assert cli.run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["messages"] == [*messages, {"role": "assistant", "content": found["answer"]}]
    return found["answer"]


@pytest.mark.slow  # two minutes: transformers writes a thousand tokens in fp32
def test_fifty_conversations_are_answered_as_transformers_does(
    smollm2: Path, real_data: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
        monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **options: {"fp32": engine}[options["quantize"]])
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
            else:
                assert found == expected, messages
            text = engine.tokenizer.decode(found)
            assert text.strip(), messages
            assert _told(engine, messages, capsys) == text
            body = {"messages": messages, "temperature": 0, "max_tokens": LENGTH}
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == text
    assert len(ties) <= 2, ties


def test_an_empty_system_message_is_templated_as_transformers_does(smollm2: Path, real_data: Path) -> None:
    from transformers import AutoTokenizer

    from smolforge.tokenizer import Tokenizer

    hub = AutoTokenizer.from_pretrained(str(real_data / "tokenizer" / "smollm2-135m-instruct"))
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Who are you?"}]
    ids = hub.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Tokenizer.from_pretrained(smollm2).encode_chat(messages) == ids
