"""Each wrong word gets one clear error, exit code 2, and changes nothing on disk."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_file

from smolforge import cli
from smolforge.errors import BadInput, ConfigError
from smolforge.tales.source import write


@pytest.fixture
def fail(tmp_path: Path, capsys, monkeypatch):
    """Runs a command line that must fail; its message, after checking that it is one and nothing was written."""
    monkeypatch.chdir(tmp_path)
    base = tiny_file(tmp_path)

    def run(*words: str, code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        words = tuple(base if word == "TINY" else word for word in words)
        try:
            found = cli.run(words)
        except SystemExit as error:
            found = error.code
        message = capsys.readouterr().err
        assert found == code, message
        assert "Traceback" not in message
        assert message.count("error: ") == 1
        made = [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.is_file() and p.name != "lock"]
        assert not [p for p in made if "cache" not in p.parts], made
        return message[message.index("error: ") :]

    return run


def test_unknown_preset(fail) -> None:
    assert "smollm2-135m" in fail("train", "smolm2-135m")


def test_unknown_verb_and_option(fail) -> None:
    assert "generate" in fail("generat", "x")
    assert "--tokens" in fail("train", "--token", "5")


@pytest.mark.parametrize(
    "override, words",
    [
        ("optimiser.lr=1", ("optimiser", "optimizer")),
        ("model.hiden_size=32", ("model.hiden_size", "hidden_size")),
        ("lr=1", ("lr", "optimizer.lr")),
        ("optimizer.lr=fast", ("optimizer.lr", "fast")),
        (
            "optimizer.betas=0.8",
            ("must be a list, not 0.8", "takes a list of: a number", "optimizer.betas=[0.9, 0.95]"),
        ),
        ("optimizer.betas=[0.8]", ("optimizer.betas=[0.9, 0.95]",)),
        ("optimizer.groups={norm:{lr:.3}}", ("{lr: .3}", "a space after the colon")),
        ("data.sources={a.txt:3}", ("{a.txt: 3}",)),
        ("data.sources=3", ("must be a mapping, not 3", "takes a mapping", "data.sources={tales: 1.0}")),
        ("optimizer.lr=-1", ("optimizer.lr", "greater than 0", "-1")),
        ("optimizer.lr=2024-13-45", ("optimizer.lr", "2024-13-45")),
        ("data.holdout=0.9", ("data.holdout", "less than 0.5")),
        ("training.precision=fp8", ("training.precision", "bf16", "fp8")),
        ("model.num_key_value_heads=3", ("num_attention_heads", "multiple")),
        ("model.hidden_size=33", ("hidden_size", "33", "num_attention_heads")),
        ("data.sequence_length=256", ("data.sequence_length", "256", "128")),
        ("training.tokens_per_step=100", ("training.tokens_per_step", "100", "32")),
        ("training.micro_batch=3", ("training.micro_batch", "1, 2, 4, 8")),
        ("training.steps=many", ("training.steps", "many")),
        ("nonsense", ("--set", "=")),
    ],
)
def test_configuration(fail, override, words) -> None:
    message = fail("train", "TINY", "--out", "run", "--set", override)
    for word in words:
        assert word in message


def test_a_url_without_a_weight_is_not_taken_apart(fail) -> None:
    message = fail("train", "TINY", "--set", "data.sources={https://host:80/a.txt: }")
    assert "data.sources.https://host:80/a.txt" in message
    assert "Write {" not in message


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("{train: {vocab_size: x}}", "tokenizer.train.vocab_size: 'x' is not a whole number"),
        ("{train: 3}", "tokenizer.train: must be a mapping, not 3"),
        ("3", "tokenizer: must be a string, or a mapping, not 3"),
    ],
)
def test_a_key_of_several_types_has_one_error(fail, tokenizer, message) -> None:
    assert fail("train", "TINY", "--set", f"tokenizer={tokenizer}").startswith(f"error: {message}")


def test_several_problems_are_told_together(fail) -> None:
    message = fail("train", "TINY", "--set", "optimizer.lr=-1", "--set", "data.holdout=2", "--set", "modle.x=1")
    for word in ("3 errors", "optimizer.lr", "data.holdout", "modle", "model"):
        assert word in message


@pytest.mark.parametrize(
    "words",
    [
        ("data", "show", "tales", "--model", "m", "--count", "-1"), ("data", "write", "a.jsonl", "--documents", "0"),
        ("bench", "data", "--seconds", "0"), ("train", "TINY", "--minutes", "inf"), ("summary", "pocket", "--length", "-5"),
        ("plan", "pocket", "--price", "nan"), ("eval", "m", "--tasks", "a", "--shots", "-1"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(fail, words) -> None:
    assert f"error: {words[-2]}: must be " in fail(*words)


def test_options_of_train(fail) -> None:
    assert "--skip-steps" in fail("train", "TINY", "--skip-steps", "9:3")
    assert "--time-limit" in fail("train", "TINY", "--time-limit", "soon")
    assert "--steps" in fail("train", "TINY", "--steps", "ten")
    assert "--steps" in fail("train", "TINY", "--steps", "0")
    assert "twice" in fail("train", "TINY", "--data", "a.txt", "a.txt")
    assert "not allowed" in fail("train", "TINY", "--steps", "5", "--tokens", "5k")


def test_an_option_is_named_as_it_was_typed(fail) -> None:
    assert fail("train", "TINY", "--data=missing.txt").startswith("error: --data: ")
    assert fail("train", "TINY", "--init", "nowhere").startswith("error: --init: ")
    assert fail("train", "TINY", "--set", "init=nowhere").startswith("error: init: ")
    problems = [BadInput("is too large", field="optimizer.lr"), BadInput("is odd", field="data.lanes")]
    error = ConfigError(problems)
    cli.name_options(error, ["train", "--lr", "9"])
    assert str(error) == "2 errors in the configuration:\n--lr: is too large\ndata.lanes: is odd"


def test_data_files(fail, tmp_path) -> None:
    def message(name: str, content: bytes | None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return fail("train", "TINY", "--out", "run", "--data", name)

    assert "missing.txt" in message("missing.txt", None)
    assert "empty.txt" in message("empty.txt", b"")
    assert "latin.txt" in message("latin.txt", b"caf\xe9 " * 1000)
    assert "bad.jsonl" in message("bad.jsonl", b'{"text": "one"}\n{"text": \n')
    assert "body" in message("column.jsonl", b'{"body": "one"}\n' * 50)
    assert "strange.xyz" in message("strange.xyz", b"text")
    table = pa.table({"content": ["a", "b"], "id": [1, 2]})
    pq.write_table(table, tmp_path / "columns.parquet")
    said = message("columns.parquet", None)
    assert "content" in said and "id" in said and "text" in said
    whole = write(tmp_path / "whole.parquet", documents=range(50)).read_bytes()
    assert "cut.parquet" in message("cut.parquet", whole[: len(whole) // 2])


def test_generate(fail, tmp_path, capsys) -> None:
    assert cli.run(["train", tiny_file(tmp_path), "--out", "run", "--steps", "1"]) == 0
    capsys.readouterr()
    assert "empty" in fail("generate", "run", "")
    message = fail("generate", "run", "word " * 400)
    assert "128" in message
    assert "--top-p" in fail("generate", "run", "--top-p", "1.5")
    assert "nowhere" in fail("generate", "nowhere")
    assert "missing.txt" in fail("eval", "run", "--data", "missing.txt")
    for line in (
        "eval run --data tales --length 0", "generate run --max-tokens -1", "generate run --temperature -1",
        "generate run --top-p 0", "generate run --draft nowhere",
        "export run --to merged --out new --adapter nowhere", "export run --to space --out run", "serve run --port 99999",
        "serve run --max-batch 0",
    ):  # fmt: skip
        message = fail(*line.split())
        assert message.startswith(f"error: {line.split()[-2]}: "), message
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "gpt2" in fail("generate", "other")


def test_output_directory_of_another_run(fail, tmp_path, capsys) -> None:
    assert cli.run(["train", tiny_file(tmp_path), "--out", "run", "--steps", "1"]) == 0
    capsys.readouterr()
    message = fail("train", "smollm2-135m", "--out", "run")
    assert "another run" in message and "--fresh" in message


@pytest.mark.parametrize("share", ["0%", "x%", "-5%"])
def test_a_cooldown_is_steps_or_a_share(share: str, fail) -> None:
    message = fail("train", "TINY", f"--cooldown={share}")
    assert f"--cooldown: {share!r} is not a share above 0%" in message and "such as 20%" in message
