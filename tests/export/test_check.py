"""`export --check`: texts of llama.cpp beside ours, where another program stands for it; test_llama_cpp.py has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smolforge import cli
from smolforge.chat_template import CHATML
from smolforge.checkpoint.format import write_model
from smolforge.config import ModelConfig
from smolforge.export.gguf import export_gguf
from smolforge.generation import Engine, SamplingParams
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer


class Double:
    """Answers as llama_cpp.Llama does, by smolforge; `second` begins with the second likeliest token instead."""

    second = False
    babbles = ""

    def __init__(self, path: str, **_: Any) -> None:
        self.engine = Engine.from_pretrained(path, quantize="none")

    def _text(self, prompt: Any, temperature: float, max_tokens: int) -> str:
        assert temperature == 0
        if self.babbles:
            return self.babbles
        ids = self.engine.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        begun: list[int] = []
        if self.second:
            first = next(self.engine.stream([ids], SamplingParams(temperature=0, max_tokens=1, logprobs=2)))
            begun = [first.top_logprobs[1][0]]
        params = SamplingParams(temperature=0, max_tokens=max_tokens - len(begun))
        return self.engine.tokenizer.decode(begun) + self.engine.generate([*ids, *begun], params)

    def create_completion(self, prompt: str, **words: Any) -> dict[str, Any]:
        return {"choices": [{"text": self._text(prompt, **words)}]}

    def create_chat_completion(self, messages: list[dict[str, str]], **words: Any) -> dict[str, Any]:
        text = self._text(self.engine.tokenizer.encode_chat(messages), **words)
        return {"choices": [{"message": {"content": text}}]}


def make(directory: Path, *, chat: bool) -> Path:
    config = ModelConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    tokenizer = Tokenizer.train(["the cat sat on the mat and saw the other cat " * 20], 320)
    talker = Tokenizer(tokenizer.backend, {**tokenizer.config, **({"chat_template": CHATML} if chat else {})})
    write_model(directory, config, build_model(config, seed=5).state_dict(), talker)
    return directory


@pytest.mark.parametrize("chat", [False, True])
def test_equal_texts_near_ties_and_babble(
    tmp_path: Path, chat: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Double))
    model = make(tmp_path / "m", chat=chat)
    words = ["export", str(model), "--to", "gguf", "--out", str(tmp_path / "x.gguf"), "--quantize", "q8_0", "--check"]
    assert cli.run(words) == 0
    assert "the same greedy text for 3 of 3 prompts" in capsys.readouterr().out
    monkeypatch.setattr(Double, "second", True)
    assert cli.run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert len(found) == 3 and all(0 < each["gap"] < 0.7 and each["ours"] != each["theirs"] for each in found)
    monkeypatch.setattr(Double, "babbles", "\u00ff<|im_start|>")
    assert cli.run(words) != 0
    assert "llama.cpp answers" in capsys.readouterr().err and (tmp_path / "x.gguf").is_file()


def test_an_answer_that_ends_where_ours_goes_on_is_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smolforge.export.check import compare_with_llama_cpp

    path = export_gguf(make(tmp_path / "m", chat=False), tmp_path / "x.gguf", kind="f32").path
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Double))
    (whole,) = compare_with_llama_cpp(path, prompts=("the cat",))
    assert whole.gap == 0 and whole.ours
    monkeypatch.setattr(Double, "babbles", whole.ours[:3])
    (cut,) = compare_with_llama_cpp(path, prompts=("the cat",))
    assert cut.gap > 0 and cut.theirs == whole.ours[:3]


@pytest.mark.parametrize("goal", ["gguf", "ollama"])
def test_without_llama_cpp_it_is_refused_before_anything_is_written(
    tmp_path: Path, goal: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    model = make(tmp_path / "m", chat=True)
    assert cli.run(["export", str(model), "--to", goal, "--out", str(tmp_path / "x.gguf"), "--check"]) == 2
    assert "llama-cpp-python" in capsys.readouterr().err and not (tmp_path / "x.gguf").exists()
    assert cli.run(["export", str(model), "--to", "checkpoint", "--out", str(tmp_path / "c"), "--check"]) == 2
    assert "--check" in capsys.readouterr().err
