"""smolforge from Python: its names, its examples, and plain errors for plain mistakes."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.metadata import version
from pathlib import Path

import pytest

import smolforge
from smolforge import cli
from smolforge.errors import BadInput

ROOT = Path(__file__).parents[1]
WITH_EXAMPLES = ("smolforge", "smolforge.api", "smolforge.run", "smolforge.training.api")
SMALL = ["tokenizer.train.documents=60", "evaluation.tokens=2000", "samples.max_tokens=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which runs/pocket is a run of two steps."""
    directory = tmp_path_factory.mktemp("python")
    changes = [word for change in SMALL for word in ("--set", change)]
    assert cli.run(["train", "pocket", "--steps", "2", "--out", str(directory / "runs" / "pocket"), *changes]) == 0
    return directory


@pytest.fixture(scope="module")
def model(place: Path) -> smolforge.Model:
    return smolforge.load(place / "runs" / "pocket")


def test_the_sources_have_a_version_without_being_installed(monkeypatch) -> None:
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert smolforge.__version__ == "0+sources"


def test_the_names_are_listed_and_each_is_documented() -> None:
    names = dir(smolforge)
    assert {"__version__", "train", "load", "evaluate", "generate", "Run", "Model", "Engine"} <= set(names)
    assert smolforge.__version__ == version("smolforge")
    for name in names:
        assert name == "__version__" or getattr(smolforge, name).__doc__, name
    with pytest.raises(AttributeError, match="nonsense"):
        smolforge.nonsense  # type: ignore[attr-defined] # noqa: B018
    assert (Path(smolforge.__file__).parent / "py.typed").is_file()


def test_what_a_public_name_offers_is_documented() -> None:
    """Each public method and property of the public classes has words of its own."""
    silent = []
    for name in dir(smolforge):
        for member, value in (
            vars(getattr(smolforge, name)).items() if inspect.isclass(getattr(smolforge, name)) else ()
        ):
            is_code = inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))
            if not member.startswith("_") and is_code and not value.__doc__:
                silent.append(f"{name}.{member}")
    assert not silent, silent


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_docstrings_run(module: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried and not failed


@pytest.mark.slow
def test_pyright_accepts_the_programs_of_examples_strictly(tmp_path: Path) -> None:
    programs = [str(path) for path in sorted((ROOT / "examples").glob("*.py"))]
    settings = {"typeCheckingMode": "strict", "include": programs, "extraPaths": [str(ROOT / "src")]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    words = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert len(programs) == 5 and not done.returncode, done.stdout


@pytest.mark.slow
def test_pyright_accepts_the_examples_strictly(tmp_path: Path) -> None:
    parts = []
    for module in WITH_EXAMPLES:
        for found in doctest.DocTestFinder().find(importlib.import_module(module)):
            parts += ["".join(example.source for example in found.examples)] if found.examples else []
    functions = ["def example_%d() -> None:\n%s\n" % (n, "".join(f"    {line}\n" for line in part.splitlines())) for n, part in enumerate(parts)]  # fmt: skip  # noqa: UP031
    (tmp_path / "examples.py").write_text("\n".join(functions))
    rules = '{"typeCheckingMode": "strict", "reportUnusedVariable": false, "reportUnusedFunction": false, "reportUnusedExpression": false}'
    (tmp_path / "pyrightconfig.json").write_text(rules)
    source = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=source, cwd=tmp_path)
    assert not done.returncode, done.stdout


def test_several_texts_and_a_stream_are_those_of_one(model: smolforge.Model) -> None:
    settings = {"max_tokens": 6, "seed": 3}
    alone = [model.generate(prompt, **settings) for prompt in ("One", "Two")]
    assert model.generate(["One", "Two"], **settings) == alone
    assert ["".join(model.stream(prompt, **settings)) for prompt in ("One", "Two")] == alone
    score = model.score("Once upon a time")
    assert score.n_bytes == 16 and score.bits_per_byte > 0
    assert model.score(["Once upon a time", "One"]).documents == 2


def test_a_conversation_is_answered(model: smolforge.Model) -> None:
    from smolforge.generation import CHAT_SAMPLING, Conversation, Engine
    from smolforge.training.finetuning import with_chat_template

    with pytest.raises(BadInput, match="no chat template"):
        model.chat("Hello?")
    assert model.directory is not None
    module, tokenizer, _ = smolforge.load_model(model.directory)
    talker = smolforge.Model(Engine.from_model(module, with_chat_template(tokenizer)))
    messages = [{"role": "user", "content": "Hello?"}]
    answer = talker.chat(messages, max_tokens=6, seed=1)
    params = smolforge.SamplingParams(**{**CHAT_SAMPLING, "max_tokens": 6, "seed": 1})  # as of `smolforge chat`
    assert (
        answer
        == "".join(Conversation(talker.engine, params).ask("Hello?"))
        == talker.chat("Hello?", max_tokens=6, seed=1)
    )


def test_the_history_is_a_table_or_rows(place: Path) -> None:
    run = smolforge.Run(place / "runs" / "pocket")
    rows = run.history(frame=False)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    frame = pytest.importorskip("pandas") and run.history()
    assert len(frame) == len(rows) and frame["validation.bits_per_byte"].notna().sum() == 1
    with pytest.raises(BadInput, match="holds no run"):
        smolforge.Run(place / "nothing").history()


def test_plain_mistakes_have_plain_errors(model: smolforge.Model, place: Path) -> None:
    pocket = place / "runs" / "pocket"
    for mistake, said in (
        (lambda: model.generate("Once", max_token=5), "unknown setting 'max_token'(.|\n)*Did you mean 'max_tokens'"),
        (lambda: model.generate([1, 2]), "prompt: must be a text or a list of texts"),  # type: ignore[list-item]
        (lambda: model.stream(["One"]), "prompt: must be one text"),  # type: ignore[arg-type]
        (lambda: next(model.engine.stream("Once")), "must be a list of prompts, not one text"),
        (lambda: smolforge.load("nowhere"), "nowhere"),
        (lambda: smolforge.evaluate(pocket, "nowhere.txt"), "no such file"),
        (lambda: smolforge.evaluate(pocket, "tales", length=9999), "does not fit the model's 512 positions"),
        (lambda: smolforge.train("poket", out=place / "new"), "Did you mean 'pocket'"),
        (lambda: smolforge.train("pocket", out=place / "new", steps=5, tokens=5), "give one of steps, tokens"),
    ):
        with pytest.raises(smolforge.SmolforgeError, match=said):
            mistake()
