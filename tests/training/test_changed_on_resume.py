"""What may change when a run is resumed, what may not, and that nothing is written before all of it is known to work."""

import json

import pytest
from tiny import steps_of, undo_after, weights_of

from smolforge.errors import BadInput, CheckpointError
from smolforge.metrics_log import read_metrics
from smolforge.run import Run
from smolforge.training import setup
from smolforge.training.train import Trainer

REFUSED = [
    {"training": {"micro_batch": 3}},
    {"training": {"attention": "flex"}},
    {"training": {"precision": "fp16"}},
    {"training": {"memory": 1000}},
    {"training": {"loss": "linear", "z_loss": 0.1}},
    {"training": {"seed": 2}},
    {"optimizer": {"name": "adamv"}},
    {"data": {"lanes": 8}},
    {"model": {"hidden_size": 48}},
]
ACCEPTED = [
    {"training": {"precision": "bf16-pure", "micro_batch": 2, "attention": "blocked"}},
    {"training": {"precision": "fp32", "micro_batch": "auto", "loss": "full"}, "optimizer": {"name": "muon"}},
    {"optimizer": {"name": "adamw", "lr": 1e-3, "groups": {"embed": {"lr": 0.5}}}, "training": {"grad_clip": 0}},
    {"schedule": {"name": "cosine"}, "evaluation": {"tokens": 1000}, "samples": {"prompts": ["Another"]}},
]


class Killed(BaseException):
    """Ends a start or a step as kill -9 would: nothing after it runs that could save something."""


def test_a_refused_change_leaves_the_run_as_it_was(make_run) -> None:
    run = make_run(training={"steps": 3})
    before = run.config_path.read_text(), run.metrics_path.read_text()
    for change in REFUSED:
        with pytest.raises(BadInput):
            make_run(**change)
        assert (run.config_path.read_text(), run.metrics_path.read_text()) == before, change
    make_run(training={"steps": 4})
    assert [step for step, _, _ in steps_of(run)] == [1, 2, 3, 4]


def test_an_accepted_change_holds_from_then_on(make_run) -> None:
    run = make_run(training={"steps": 2})
    for step, change in enumerate(ACCEPTED, start=3):
        make_run(**change, request={"more_steps": 1})
        assert steps_of(run)[-1][0] == step, change
    make_run(request={"more_steps": 2})
    assert [step for step, _, _ in steps_of(run)] == list(range(1, len(ACCEPTED) + 5))


def test_a_change_whose_first_step_fails_is_not_kept(make_run, monkeypatch) -> None:
    run = make_run(training={"steps": 3})
    before = run.config_path.read_text()

    def fail(self, batch) -> None:
        raise NotImplementedError("no such kernel")

    with monkeypatch.context() as patch, pytest.raises(NotImplementedError):
        patch.setattr(Trainer, "_step", fail)
        make_run(training={"steps": 5, "loss": "full"})
    assert run.config_path.read_text() == before
    make_run(training={"steps": 5})
    assert steps_of(run)[-1][0] == 5


@pytest.mark.parametrize("moment", ["the optimizer", "the second step"])
def test_what_was_killed_before_its_first_checkpoint_starts_with_what_is_asked_now(
    make_run, tmp_path, monkeypatch, moment
) -> None:
    def kill(*_, **__) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            *((setup, "build_optimizer", kill) if moment == "the optimizer" else (Trainer, "_save_and_evaluate", kill))
        )
        make_run()
    run = Run(tmp_path / "run")
    assert (run.path / "tokenizer").exists() and run.exists == (moment != "the optimizer")
    (tmp_path / "other.txt").write_text("<|endoftext|>".join(f"Tale {i}: " + "a word of it. " * 40 for i in range(60)))
    other = {str(tmp_path / "other.txt"): 1.0}
    make_run(tokenizer={"train": {"vocab_size": 300}}, data={"sources": other}, training={"steps": 2})
    vocabulary = json.loads((run.path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) <= 300 and "vocab_size: 300" in run.config_path.read_text()
    assert "other.txt" in run.index_path.read_text()


def test_a_run_without_a_whole_checkpoint_is_not_started_over(make_run) -> None:
    run = make_run(training={"steps": 5})
    before = run.metrics_path.read_text()
    for weights in run.checkpoints_path.glob("step-*/model.safetensors"):
        weights.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="none of them whole"):
        make_run(training={"steps": 8})
    assert run.metrics_path.read_text() == before
    make_run(training={"steps": 2}, request={"fresh": True})
    assert steps_of(run)[-1][0] == 2


def test_fresh_keeps_a_symlink_and_moves_the_run_that_it_leads_to(make_run, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run").symlink_to(disk / "mine", target_is_directory=True)
    (disk / "mine").mkdir()
    make_run(training={"steps": 2})
    make_run(training={"steps": 1}, request={"fresh": True})
    assert (tmp_path / "run").is_symlink()
    assert steps_of(Run(disk / "mine"))[-1][0] == 1
    assert steps_of(Run(disk / "mine.before-1"))[-1][0] == 2


def test_every_row_has_a_speed(make_run) -> None:
    run = make_run(training={"steps": 2})
    make_run(training={"steps": 3})
    assert all(row["tokens_per_second"] > 0 for row in read_metrics(run) if "loss" in row)


def test_a_jump_of_the_learning_rate_is_announced(make_run, caplog) -> None:
    caplog.set_level("INFO")
    make_run(training={"steps": 12}, schedule={"warmup": 2, "decay": 4})
    caplog.clear()
    make_run(request={"more_steps": 12})  # from the end of the decay back to the peak
    assert "learning rate: 6.00e-04 at step 12, 3.00e-03 from step 13 on (12 → 24 steps)" in caplog.text
    caplog.clear()
    make_run(request={"more_steps": 12}, optimizer={"lr": 6e-4})  # the peak is where the decay had come to
    assert "learning rate:" not in caplog.text


def test_a_cooldown_ends_a_run_of_no_fixed_length(make_run, caplog) -> None:
    """The rate falls from where it is to zero; an interrupted cooldown that is asked for again ends where it would have."""
    caplog.set_level("INFO")
    often = {"every": 2, "keep": 9}
    run = make_run(training={"steps": 10}, schedule={"name": "constant", "warmup": 0}, checkpoint=often)
    wanted = {"more_steps": "50%", "cooldown": True}
    make_run(request=wanted)
    rates = [row["lr"] for row in read_metrics(run) if "lr" in row]
    assert len(rates) == 15 and rates[9] == 3e-3
    assert rates[10:] == pytest.approx([3e-3 * left / 6 for left in (5, 4, 3, 2, 1)])
    weights = weights_of(run)
    undo_after(run, 12)
    make_run(request=wanted)
    assert weights_of(run) == weights and "+50% steps were already requested at step 10: 3 are left" in caplog.text
    with pytest.raises(BadInput, match=r"--cooldown: .*holds no run to extend"):
        make_run("another", request=wanted)
