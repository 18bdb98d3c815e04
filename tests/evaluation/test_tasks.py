"""lm-eval's tasks: a wrapped model has the numbers of lm-eval's own `hf` model on the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smolforge import cli
from smolforge.chat_template import CHATML
from smolforge.checkpoint.format import write_model
from smolforge.checkpoint.locate import load_model
from smolforge.config import ModelConfig
from smolforge.errors import BadInput
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytest.importorskip("transformers", reason="the hf model of lm-eval needs it")

from smolforge.evaluation.tasks import run_tasks, wrap_model

QUESTIONS = [
    ("The cat sat on the", [" mat", " moon and saw the other cat", " 12"], 0),
    ("Once upon a time, there was a", [" cat", " dog that"], 1),
    ("", [" the mat", "cat"], 0),
    ("A long beginning that does not fit. " * 12 + "The other cat saw the", [" cat", " mat on the mat"], 1),
    ("naïve 🙂 cats <|endoftext|> and", [" the cat", "\n\n"], 0),
]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}{{choices[0]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until", "doc_to_text": "{{question}} x", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": [" a", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("harness") / "model"
    config = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    tokenizer = Tokenizer.train(["the cat sat on the mat and saw the other cat, once upon a time " * 20], 300)
    module = build_model(config, seed=7)
    with torch.no_grad():
        for parameter in module.parameters():  # wide logits: a wrong position would show
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    write_model(directory, config, module.state_dict(), tokenizer)
    return directory


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    rows = [{"question": q, "choices": c, "label": a} for q, c, a in QUESTIONS]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
                  "test_split": "test", "metadata": {"version": 1}}  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def reference(model: Path, batch: int = 1) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), dtype="float32", batch_size=batch, device="cpu")


@pytest.fixture(scope="module")
def both(model: Path) -> tuple[Any, Any]:
    """The wrapper serves any architecture, so on a Llama it can be compared with what needs none."""
    return wrap_model(model, batch=3, device="cpu"), reference(model)


def asked(*arguments: tuple) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, args, 0) for args in arguments]


def test_loglikelihoods_are_those_of_hf(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    requests = asked(*((q, c) for q, choices, _ in QUESTIONS for c in choices))
    for a, b in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]
    texts = asked(*((q + c[0],) for q, c, _ in QUESTIONS))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)


def test_some_continuation_is_greedy(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    knobs = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False}
    written = ours.generate_until(asked(("the cat", knobs)))[0]
    (value, greedy), (expected, also) = (
        ours.loglikelihood(asked(("the cat", written)))[0],
        theirs.loglikelihood(asked(("the cat", written)))[0],
    )
    assert value == pytest.approx(expected, abs=1e-4) and greedy == also


def test_written_texts_are_those_of_hf(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    # No stop string that is part of a special token's name: `hf` stops there too, though the text does not show it.
    knobs = [{"until": [" a", "\r"], "max_gen_toks": 20}, {"until": [], "max_gen_toks": 9, "do_sample": False}]
    requests = asked(*((q or "x", k) for k in knobs for q, *_ in QUESTIONS))
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_tasks_of_ones_own_give_the_numbers_of_hf(
    model: Path, task_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ",".join(TASKS)
    assert cli.run(["eval", str(model), "--tasks", names, "--task-files", str(task_files), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["tasks"]
    manager = TaskManager(include_path=str(task_files), include_defaults=False)
    theirs = simple_evaluate(reference(model), tasks=list(TASKS), task_manager=manager, bootstrap_iters=1000)["results"]
    assert ours.keys() == TASKS.keys()
    for task in TASKS:
        for entry in TASKS[task]["metric_list"]:
            metric = entry["metric"]
            assert ours[task][metric] == pytest.approx(theirs[task][f"{metric},none"], rel=1e-4), (task, metric)
    assert 0 < ours["choices"]["acc"] <= 1


def test_what_is_shown(model: Path, task_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(model), "--tasks", "choices", "--task-files", str(task_files), "--limit", "2"]
    assert cli.run(words) == 0
    shown = capsys.readouterr()
    assert "choices" in shown.out and "acc_norm" in shown.out and "±" in shown.out
    with pytest.raises(SystemExit):
        cli.run([*words[:-2], "--limit", "0"])
    assert "--limit" in capsys.readouterr().err


@pytest.mark.parametrize("template", [False, True])
def test_every_item_is_scored_as_by_hf(
    model: Path, task_files: Path, tmp_path: Path, template: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF file through the verb, and the same model through lm-eval's own `hf`: each item's log-likelihoods."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from smolforge.export.gguf import export_gguf

    module, tokenizer, _ = load_model(model)
    talker = Tokenizer(tokenizer.backend, {**tokenizer.config, "chat_template": CHATML})
    write_model(tmp_path / "m", module.config, module.state_dict(), talker)
    path, names = export_gguf(tmp_path / "m", tmp_path / "m.gguf", kind="f32").path, ["choices", "written"]
    whole, found = evaluator.simple_evaluate, []

    def keep(**words: Any) -> Any:
        found.append(whole(**{**words, "log_samples": True}))
        return found[-1]

    monkeypatch.setattr(evaluator, "simple_evaluate", keep)
    words = ["eval", str(path), "--tasks", ",".join(names), "--task-files", str(task_files), "--json"]
    assert cli.run(words + ["--apply-chat-template"] * template) == 0
    manager = TaskManager(include_path=str(task_files), include_defaults=False)
    whole_words: dict[str, Any] = {"tasks": names, "task_manager": manager, "apply_chat_template": template}
    theirs = whole(reference(tmp_path / "m"), log_samples=True, bootstrap_iters=0, **whole_words)["samples"]
    for task in names:
        assert len(theirs[task]) == len(QUESTIONS)
        for ours, expected in zip(found[0]["samples"][task], theirs[task], strict=True):
            assert ours["arguments"] == expected["arguments"]
            assert ("<|im_start|>assistant" in str(ours["arguments"])) is template
            for a, b in zip(ours["filtered_resps"], expected["filtered_resps"], strict=True):
                assert a == b if isinstance(b, str) else (a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1])


def test_a_base_model_has_no_template_to_apply(
    model: Path, task_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(model), "--tasks", "choices", "--task-files", str(task_files), "--apply-chat-template"]
    assert cli.run(words) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_long_requests_are_logged(both: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    both[0].loglikelihood(asked(("x " * 200, " cat"), ("x", " cat")))
    assert len([text for text in caplog.messages if "exceeds model's maximum length (64)" in text]) == 1


def test_a_gguf_file_has_the_numbers_of_its_directory(model: Path, task_files: Path, tmp_path: Path) -> None:
    from smolforge.export.gguf import export_gguf

    path = export_gguf(model, tmp_path / "m.gguf", kind="f32").path
    expected, found = (run_tasks(place, list(TASKS), task_files=task_files) for place in (model, path))
    assert found.keys() == expected.keys() == TASKS.keys()
    for task, metrics in expected.items():
        for name, value in metrics.items():
            assert found[task][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (
                task,
                name,
            )


def test_the_recreation_is_scored(model: Path, task_files: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        architecture="recreation", vocab_size=300, hidden_size=36, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, rope_theta=10_000.0,
    )  # fmt: skip
    write_model(tmp_path / "m", config, build_model(config, seed=2).state_dict(), Tokenizer.from_pretrained(model))
    scores = run_tasks(tmp_path / "m", list(TASKS), task_files=task_files)
    assert scores.keys() == TASKS.keys() and scores["rolling"]["bits_per_byte"] > 1


@pytest.mark.parametrize(
    ("tasks", "words"),
    [("choizes", "unknown task 'choizes'"), ("broken", "cannot be run"), (",", "names no task")],
)
def test_tasks_that_cannot_be_used(
    model: Path,
    task_files: Path,
    tmp_path: Path,
    tasks: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager  # reading all of lm-eval's own files takes long, and would show no more
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **words: whole(**{**words, "include_defaults": False}))
    broken = yaml.safe_load((task_files / "choices.yaml").read_text())
    broken |= {"task": "broken", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "nothing.jsonl")}}}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    assert cli.run(["eval", str(model), "--tasks", tasks, "--task-files", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err and not said.out


def test_a_missing_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        run_tasks(model, ["x"], task_files=tmp_path / "nowhere")
