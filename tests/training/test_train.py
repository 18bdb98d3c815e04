"""A run from its beginning to its end, gone on with, extended, and refused where it should be."""

import json
import math
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import steps_of, tiny_file, validations_of, weights_of
from tokenizers import Tokenizer as Backend

from smolforge import config as configuration
from smolforge.data import Corpus
from smolforge.errors import BadInput, CheckpointError, SmolforgeError
from smolforge.files import read_json_lines
from smolforge.metrics_log import read_metrics
from smolforge.run import Run
from smolforge.training import checkpointing
from smolforge.training.api import train
from smolforge.training.setup import TrainRequest
from smolforge.training.train import run_training


def test_a_run_leaves_what_it_promises(make_run) -> None:
    run = make_run()
    rows = steps_of(run)
    assert [step for step, _, _ in rows] == list(range(1, 21))
    assert abs(rows[0][1] - math.log(320) - 0.5) < 0.5 and rows[-1][1] < rows[0][1] - 0.5
    assert [step for step, _ in validations_of(run)] == [10, 20]
    scores = validations_of(run)[-1][1]
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    floors = [row["entropy_bits_per_byte"] for row in read_metrics(run) if "validation" in row]
    assert all(0 < floor < scores["bits_per_byte"] for floor in floors)
    assert [(row["step"], row["prompt"]) for row in list(read_json_lines(run.samples_path))] == [
        (10, "Once upon a time"),
        (20, "Once upon a time"),
    ]
    kept = sorted(path.name for path in run.checkpoints_path.iterdir() if path.is_dir() and not path.is_symlink())
    assert kept == ["step-00000010", "step-00000015", "step-00000020"]
    assert "http" not in [line[:4] for line in run.report_path.read_text().split('src="')[1:]]
    saved = configuration.build_config(str(run.config_path))
    assert saved.model.hidden_size == 32 and saved.training.steps == 20
    environment = json.loads((run.path / "environment.json").read_text())
    assert any(line.startswith("precision: fp32") for line in environment["decisions"])
    tokenizer = json.loads((run.checkpoints_path / "last" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == saved.model.max_position_embeddings == 128


def test_transformers_loads_the_checkpoint_and_writes_the_same(make_run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smolforge.generation import Engine, SamplingParams

    run = make_run()
    directory = run.checkpoints_path / "last"
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    expected = theirs.generate(ids, max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0)
    engine = Engine.from_pretrained(run.path, quantize="fp32")
    wanted = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    ours = [step.token_id for step in engine.stream(["Once upon a time"], wanted) if step.token_id is not None]
    assert ours == expected[0, ids.shape[1] :].tolist()


def test_stopped_and_resumed_equals_uninterrupted(make_run) -> None:
    whole = make_run("whole")
    parts = make_run("parts", training={"steps": 20})
    # The same length of run, cut in two by hand: what a kill after step 10 leaves behind.
    for step in (15, 20):
        for path in sorted((parts.checkpoints_path / f"step-{step:08d}").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (parts.checkpoints_path / f"step-{step:08d}").rmdir()
    random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002 other draws in between change nothing
    parts = make_run("parts")
    assert steps_of(parts) == steps_of(whole)
    assert validations_of(parts) == validations_of(whole)
    assert list(read_json_lines(parts.samples_path)) == list(read_json_lines(whole.samples_path))
    assert weights_of(parts) == weights_of(whole)
    assert sum(row.get("event") == "resume" for row in read_metrics(parts)) == 1


def test_fifty_more_steps_are_trained(make_run) -> None:
    run = make_run()
    before = weights_of(run)
    again = make_run(request={"more_steps": 50})
    rows = steps_of(again)
    assert [step for step, _, _ in rows] == list(range(1, 71))
    assert weights_of(again) != before
    # The data goes on where it stopped: no batch of the first twenty steps comes again.
    assert len({digest for _, _, digest in rows}) == 70
    assert np.mean([loss for _, loss, _ in rows[-10:]]) < np.mean([loss for _, loss, _ in rows[10:20]])


def test_a_complete_run_says_so_and_changes_nothing(make_run, capsys) -> None:
    run = make_run()
    before = run.metrics_path.read_bytes()
    train(out=run.path)
    assert run.metrics_path.read_bytes() == before
    assert "--steps +50" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "change, field",
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size"),
        ({"data": {"sequence_length": 64}}, "data.sequence_length"),
        ({"training": {"tokens_per_step": 512}}, "training.tokens_per_step"),
        ({"data": {"sources": {"tales": 2.0}}}, "data.sources.tales"),
    ],
)
def test_another_run_is_not_gone_on_with(make_run, change, field) -> None:
    run = make_run(training={"steps": 5})
    before = weights_of(run)
    with pytest.raises(BadInput) as caught:
        train(out=run.path, quiet=True, config=change)
    assert field in str(caught.value) and "--fresh" in str(caught.value)
    assert weights_of(run) == before


def test_how_a_run_goes_on_may_change(make_run) -> None:
    make_run(training={"steps": 5})
    run = make_run(training={"steps": 8}, optimizer={"lr": 1e-3})
    assert [row["lr"] for row in read_metrics(run) if row.get("step") == 6 and "lr" in row] == [1e-3]


def test_fresh_keeps_the_earlier_run(make_run, tmp_path) -> None:
    first = make_run(training={"steps": 5})
    kept = weights_of(first)
    make_run(training={"steps": 5, "seed": 1}, request={"fresh": True})
    assert weights_of(Run(tmp_path / "run.before-1")) == kept
    assert weights_of(first) != kept


@pytest.mark.parametrize("wrong", [{"optimizer": {"lr": -1}}, {"data": {"sources": {"texst.jsonl": 1.0}}}])
def test_fresh_that_cannot_begin_leaves_the_earlier_run(make_run, tmp_path, wrong) -> None:
    first = make_run(training={"steps": 5})
    kept = weights_of(first)
    with pytest.raises(SmolforgeError):
        make_run(request={"fresh": True}, **wrong)
    assert weights_of(first) == kept and not list(tmp_path.glob("run.before-*"))
    assert make_run(training={"steps": 6}).path == first.path


def test_steps_are_left_out_by_the_numbers_of_the_log(make_run, caplog) -> None:
    data = {step: digest for step, _, digest in steps_of(make_run("whole", training={"steps": 14}))}
    make_run(training={"steps": 5}, request={"skip": [(4, 5)]})

    def digests() -> list[str]:
        return [digest for _, _, digest in steps_of(Run(run.path))]

    for _ in range(2):  # asking again, as a supervisor does, leaves out no more
        run = make_run(training={"steps": 7}, request={"skip": [(4, 5), (7, 9), (8, 10), (2, 3)]})
        assert digests() == [data[step] for step in (1, 2, 3, 5, 6, 10, 11)]
        assert "batches 2 to 2 of the stream were trained on before step 6" in caplog.text


def test_starting_from_a_model(make_run) -> None:
    first = make_run(training={"steps": 5})
    second = make_run("second", init=str(first.path), training={"steps": 1}, optimizer={"lr": 1e-9})
    assert steps_of(second)[0][1] < steps_of(first)[0][1] - 0.3


def test_a_vocabulary_larger_than_the_models_is_refused(make_run) -> None:
    with pytest.raises(BadInput, match="vocab_size"):
        make_run(tokenizer={"train": {"vocab_size": 400, "documents": 40}})


def test_a_run_whose_prompts_cannot_be_continued_is_complete(make_run, caplog) -> None:
    caplog.set_level("INFO")
    prompts = {"prompts": ["", "Once upon a time", "word " * 200]}
    run = make_run(training={"steps": 10}, samples=prompts)
    assert {row["prompt"] for row in read_json_lines(run.samples_path)} == {"Once upon a time"}
    assert "samples.prompts: 2 left out" in caplog.text
    caplog.clear()
    make_run(training={"steps": 10})
    assert "already has 10 steps" in caplog.text


@pytest.mark.parametrize("reader", [(Backend, "from_str"), (Corpus, "open"), (checkpointing, "load_state")])
def test_a_signal_while_starting_is_no_error_of_what_it_interrupts(make_run, monkeypatch, reader) -> None:
    run = make_run(training={"steps": 5})
    before, inner = run.config_path.read_text(), getattr(*reader)

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return inner(*args, **options)

    if reader[0] is Backend:
        monkeypatch.setattr("tokenizers.Tokenizer", SimpleNamespace(from_str=interrupted))
    else:
        monkeypatch.setattr(*reader, interrupted)
    _, shutdown = run_training(TrainRequest(None, out=run.path, layers={"training": {"steps": 8}}))
    assert shutdown.exit_code == 143 and run.config_path.read_text() == before


def test_resume_needs_a_run(make_run) -> None:
    with pytest.raises(BadInput, match="no run to resume"):
        make_run("nothing", request={"must_resume": True})


def test_a_directory_of_something_else_is_left_alone(make_run, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match=r"thesis\.tex"):
        make_run("mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_damaged_newest_checkpoint_falls_back(make_run, capsys) -> None:
    whole = make_run("whole")
    run = make_run()
    path = run.checkpoints_path / "step-00000020" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    train(out=run.path)
    assert "step-00000020" in capsys.readouterr().err
    assert steps_of(run) == steps_of(whole) and weights_of(run) == weights_of(whole)


def test_checkpoint_of_another_architecture_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(CheckpointError, match="gpt2"):
        train(tiny_file(tmp_path), out=tmp_path / "run", init=str(tmp_path), quiet=True)


def test_masking_documents_trains(make_run, tmp_path) -> None:
    rows = [json.dumps({"text": f"short text number {i} ends here"}) for i in range(400)]
    (tmp_path / "short.jsonl").write_text("\n".join(rows))
    data = {"sources": {str(tmp_path / "short.jsonl"): 1.0}}
    plain = make_run("plain", training={"steps": 3}, data=data)
    masked = make_run("masked", training={"steps": 3}, data={**data, "mask_documents": True})
    assert [d for _, _, d in steps_of(plain)] == [d for _, _, d in steps_of(masked)]
    assert steps_of(plain)[-1][1] != steps_of(masked)[-1][1]


def test_micro_batches_add_up(make_run) -> None:
    one = make_run("one", training={"steps": 5, "micro_batch": 8})
    many = make_run("many", training={"steps": 5, "micro_batch": 2})
    for (_, a, _), (_, b, _) in zip(steps_of(one), steps_of(many), strict=True):
        assert a == pytest.approx(b, abs=2e-6)


def test_a_validation_still_owed_at_the_end_is_made_up(make_run) -> None:
    run = make_run(training={"steps": 10})
    rows, texts = run.metrics_path.read_text(), run.samples_path.read_text()
    # Killed after the last save and before the validation that follows it.
    run.metrics_path.write_text("".join(line for line in rows.splitlines(keepends=True) if "validation" not in line))
    run.samples_path.write_text("")
    make_run(training={"steps": 10})
    assert [step for step, _ in validations_of(run)] == [10]
    assert run.samples_path.read_text() == texts
    assert steps_of(run)[-1][0] == 10
