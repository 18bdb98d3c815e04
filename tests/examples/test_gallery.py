"""The examples: each runs small. tests/test_python.py has pyright read them strictly."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from smolforge import cli
from training.test_own_text import sentences

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL = ["model.hidden_size=48", "model.intermediate_size=64", "model.num_hidden_layers=1", "model.vocab_size=512",
         "model.max_position_embeddings=256", "tokenizer.train.vocab_size=512", "tokenizer.train.documents=40",
         "data.sequence_length=256", "training.tokens_per_step=512", "evaluation.tokens=1000", "samples.max_tokens=4"]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with texts, questions, and a model to start from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(sentences(60, i))
    (tmp_path / "faq.jsonl").write_text(
        "".join(json.dumps({"question": f"What is {i}?", "answer": "A number."}) + "\n" for i in range(60))
    )
    return tmp_path


def base() -> str:
    """A tiny model to start from."""
    words = [word for change in SMALL for word in ("--set", change)]
    assert cli.run(["train", "pocket", "--out", "base", "--steps", "2", *words]) == 0
    return "base"


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_an_example_runs(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {
        "novel": lambda: ["texts", "--minutes", "0.02"],
        "poems": lambda: ["texts", "--epochs", "1", "--vocabulary", "600"],
        "own_code": lambda: [str(ROOT / "src" / "smolforge" / "cli"), "--minutes", "0.02"],
        "faq": lambda: ["faq.jsonl", "--init", base(), "--epochs", "1"],
        "continue_smollm2": lambda: ["texts", "--init", base(), "--steps", "3"],
    }[name]()
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*words, "--out", "run"])
    printed = capsys.readouterr().out
    assert len(printed.split()) > 3 and (place / "run" / "report.html").is_file()


def test_the_page_names_each_example() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    assert all(f"[{path.name}]({path.name})" in page for path in EXAMPLES) and len(EXAMPLES) == 5
