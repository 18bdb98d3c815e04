"""llama.cpp itself on our files: the same tokens in, the same tokens out. Runs where llama-cpp-python is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conversations import QUESTIONS
from smolforge.checkpoint.format import write_model
from smolforge.config import ModelConfig
from smolforge.export.check import compare_with_llama_cpp, summarize
from smolforge.export.gguf import export_gguf
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
TORTURE = [
    "0123456789 3.14159 1,000,000 2024", "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301",
    "日本語テキスト العربية עברית हिन्दी ไทย", " " * 300 + "x" + "\n" * 50,
    "a\tb\r\n\r\n  c\u00a0d\u3000e", "def f(x):\n\treturn x**2  # don't I'LL we've", "ſtraße ǅ ﬁ Ⅻ ½ ²³ ٣٤ a1b2c3 ①②",
    "<|endoftext|> <|im_start|>user\nhi<|im_end|>", "\u200b\ufeff\u2028x",
]  # fmt: skip


@pytest.fixture(params=["trained", "smollm2"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, Tokenizer, Any]:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if request.param == "trained":
        tokenizer = Tokenizer.train([*TORTURE, "once upon a time there was a small cat " * 30], 700)
        shape: dict[str, Any] = {"vocab_size": 704, "hidden_size": 96, "intermediate_size": 160, "rope_theta": 5000.0,
                                 "num_attention_heads": 6, "num_key_value_heads": 2}  # fmt: skip
    else:
        real = request.getfixturevalue("real_data")
        tokenizer, shape = Tokenizer.from_pretrained(real / "tokenizer" / "smollm2-135m"), {}
    config = ModelConfig(**{**shape, "num_hidden_layers": 3})
    module = build_model(config, seed=3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)  # wider logits: new weights nearly tie, and a tie has no right answer
    write_model(tmp_path / "m", config, module.state_dict(), tokenizer)
    path = export_gguf(tmp_path / "m", tmp_path / "m.gguf", kind="f32").path
    # Its cache of keys and values is f16 unless told otherwise; type 0 is f32.
    llama = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False, logits_all=True, type_k=0, type_v=0)
    return module, tokenizer, llama


def test_llama_cpp_gives_the_same_tokens(pair: Any) -> None:
    module, tokenizer, llama = pair
    for text in TORTURE:
        # add_bos: the file says that there is none, and llama.cpp keeps to it.
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text)
        commands = tokenizer.encode_with_special_tokens(text)
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == commands
    ids = tokenizer.encode("once upon a time")
    llama.eval(ids)
    for _ in range(100):
        with torch.no_grad():
            logits = module(torch.tensor([ids]))[0, -1]
        theirs = torch.tensor(llama.scores[llama.n_tokens - 1])
        assert (logits - theirs).abs().max() < 1e-3
        ids.append(int(logits.argmax()))
        assert ids[-1] == int(theirs.argmax())
        llama.eval(ids[-1:])


TEN = (*QUESTIONS[:6], *QUESTIONS[18:20], *QUESTIONS[29:31])


@pytest.mark.parametrize(("kind", "equal"), [("f32", 10), ("q8_0", 0), ("q4_1", 0)])
def test_the_genuine_model_answers_the_same(smollm2: Path, tmp_path: Path, kind: str, equal: int) -> None:
    """All ten in fp32; with fewer bits llama.cpp rounds activations to 8 bits, and near ties may go the other way."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    found = compare_with_llama_cpp(export_gguf(smollm2, tmp_path / "x.gguf", kind=kind).path, prompts=TEN)
    print(summarize(found))
    assert len(found) == 10 and sum(each.ours == each.theirs for each in found) >= equal
    assert all(each.ours.strip() for each in found)
