"""Words in any order, the names that people type, and the verbs that list what there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import make_run, steps_of, tiny_file  # noqa: F401

from smolforge import cli
from smolforge.config import build_config
from smolforge.errors import BadInput

ONE_MEANING = {
    "generate": [
        ["generate", "RUN", "Once", "--seed", "7"],
        ["generate", "RUN", "--seed", "7", "Once"],
        ["generate", "--seed", "7", "RUN", "Once"],
        ["generate", "--seed=7", "--model", "RUN", "--prompt", "Once"],
        ["generate", "--prompt=Once", "--seed", "7", "--model=RUN"],
        ["generate", "--seed", "7", "--", "RUN", "Once"],
    ],
    "eval": [
        ["eval", "RUN", "--data", "a", "b", "--tokens", "9"],
        ["eval", "--data", "a", "b", "--tokens", "9", "RUN"],
        ["eval", "--tokens", "9", "--data", "a", "b", "RUN"],
        ["eval", "--model", "RUN", "--tokens", "9", "--data", "a", "b"],
    ],
    "precisions": [
        ["eval", "RUN", "--data", "a", "--quantize", "int8", "int4"],
        ["eval", "--data", "a", "--quantize", "int8", "int4", "RUN"],
    ],
    "train": [
        ["train", "pocket", "--data", "a", "b"],
        ["train", "--data", "a", "b", "pocket"],
        ["train", "--model", "pocket", "--data", "a", "b"],
    ],
    "a place that may be empty": [["train", "--data", "a", "b"], ["train", "--data", "a", "--data", "b"]],
    "serve beside training": [["train", "--serve", "pocket", "--lr", "1"], ["train", "pocket", "--serve", "--lr", "1"]],
    "a port": [["train", "--serve", "9000", "pocket"], ["train", "pocket", "--serve", "9000"]],
    "finetune": [
        ["finetune", "RUN", "--data", "a", "b", "--epochs", "2"],
        ["finetune", "--epochs", "2", "--data", "a", "b", "RUN"],
    ],
    "data show": [["data", "show", "a", "b", "--model", "RUN"], ["data", "show", "--model", "RUN", "a", "b"]],
    "chat": [["chat", "RUN", "Hello?", "--seed", "1"], ["chat", "--seed", "1", "--model", "RUN", "--prompt", "Hello?"]],
}


@pytest.mark.parametrize("lines", ONE_MEANING.values(), ids=ONE_MEANING)
def test_words_mean_the_same_in_any_order(lines: list[list[str]]) -> None:
    first, *others = ({**vars(cli.parser(line[0]).parse_args(line)), "words": None} for line in lines)
    assert all(other == first for other in others)


def test_a_wrong_option_is_still_named(capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in (
        (["trian"], "invalid choice: 'trian'\n  Did you mean train? "),
        (["generate", "RUN", "--sed", "7", "Once"], "Did you mean --seed?"),
        (["generate", "--seed", "7"], "required: MODEL"),
        (["chat", "--prompt", "Hello?"], "--prompt needs MODEL too"),
        (["generate", "RUN", "--prompt"], "--prompt: expected one argument"),
        (["train", "--steps", "5", "--epochs", "2"], "not allowed with argument --steps"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.run(line)
        assert end.value.code == 2 and said in capsys.readouterr().err, line


def test_presets_and_keys_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    def output(*words: str) -> str:
        assert cli.run(words) == 0
        return capsys.readouterr().out

    listed = {preset["preset"]: preset for preset in json.loads(output("presets", "--json"))["presets"]}
    assert listed["smollm2-135m"]["parameters"] == 134_515_008
    assert "SmolLM2-135M as released" in output("presets")
    assert output("config", "training.loss").startswith(
        "training.loss: auto, native, chunked, linear, full (default auto)"
    )
    assert "optimizer.lr: a number (default 0.003)\n    Peak learning rate; " in output("config", "optimizer")
    assert "data.text_column" in output("config") and "training.memory: memory or auto" in output("config")
    keys = {key["key"]: key for key in json.loads(output("config", "--json"))["keys"]}
    assert keys["training.steps"] == {
        "key": "training.steps", "allowed": "a whole number or null", "default": None, "meaning": "Length of the run in steps.",
    }  # fmt: skip
    assert cli.run(["config", "optimiser.lr"]) == 2
    assert "Did you mean 'optimizer.lr'?" in capsys.readouterr().err


def test_a_file_inherits_from_the_preset_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: pocket\noptimizer: {lr: 0.001}\ntraining: {tokens: 1M}\n")
    mine, pocket = build_config(str(path)), build_config("pocket")
    assert mine.model == pocket.model and mine.optimizer.groups == pocket.optimizer.groups
    assert (mine.optimizer.lr, mine.training.tokens, mine.training.steps) == (0.001, 10**6, None)
    assert mine.preset == "mine", "what a run is named after"
    path.write_text("preset: poket\n")
    with pytest.raises(BadInput, match=r"unknown preset 'poket'(.|\n)*Did you mean 'pocket'"):
        build_config(str(path))


def test_the_configuration_of_a_run_inherits_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    whole = build_config("pocket", ["training.tokens=1M", "optimizer.groups={}"])
    path.write_text(whole.to_yaml())
    assert build_config(str(path)) == whole
    path.rename(tmp_path / "copy.yaml")
    assert build_config(str(tmp_path / "copy.yaml")) == whole.model_copy(update={"preset": "copy"})


def test_a_dry_run_tells_every_decision_and_writes_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = tiny_file(tmp_path)
    words = ["train", "--model", tiny, "--epochs", "0.00001", "--lr", "0.002", "--batch-size", "4", "--dry-run"]
    before = sorted(tmp_path.rglob("*"))
    assert cli.run(words) == 0
    told = capsys.readouterr().err
    for said in (
        "device: ", "precision: fp32 (as asked)", "batch: 128 tokens per step = ", "attention: ", "loss: ", "threads: 1",
        "data: 1 file, ", "model: llama, ", "learning rate: 0.002 at its peak", "length: ", "validation: ",
        "run: runs/tiny, a new run", "dry run: nothing was written",
    ):  # fmt: skip
        assert said in told, said
    assert sorted(tmp_path.rglob("*")) == before


def test_changed_keys_are_told_on_resume(make_run, tmp_path: Path, capsys) -> None:  # noqa: F811
    run = make_run(training={"steps": 2})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    words = ["train", "--out", str(run.path), "--lr", "0.002", "--steps", "+2"]
    said = ("optimizer.lr: 0.003 → 0.002 from step 3 on", "training.steps: 2 → 4 from step 3 on")
    assert cli.run([*words, "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert all(line in told for line in (*said, "resuming from step 2"))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert cli.run(words) == 0
    told = capsys.readouterr().err
    assert all(line in told for line in said)
    assert len(steps_of(run)) == 4
    assert yaml.safe_load(run.config_path.read_text())["optimizer"]["lr"] == 0.002
    assert cli.run(["train", tiny_file(tmp_path), "--out", str(tmp_path / "new"), "--steps", "+2"]) == 2
    assert "holds no run to extend" in capsys.readouterr().err
