"""Preferences: loss, rewards and gradients are those of a plain implementation; E1 and E2; bad pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_files import conversations, write
from chat_runs import QUICK, kill_and_resume, make_base, run_on_two_ranks, steps_of, weights_of, words

from smolforge.chat_template import ChatTemplate
from smolforge.checkpoint.locate import load_model
from smolforge.cli import run as smolforge
from smolforge.config import PreferenceConfig, build_config
from smolforge.data import Corpus, Loader
from smolforge.data.readers import BadRow
from smolforge.data.readers.conversation import conversation_text
from smolforge.distributed import DistributedContext
from smolforge.metrics_log import read_metrics
from smolforge.model.architecture import build_model
from smolforge.run import Run
from smolforge.training.finetuning import learned_targets
from smolforge.training.plan import make_plan
from smolforge.training.preferences import Preferences, preference_losses, read_windows


@pytest.fixture(scope="module")
def base(place: Path) -> Path:
    return make_base(place / "base", max_position_embeddings=320)


def pairs(count: int) -> list[dict[str, Any]]:
    """The right answer against another question's; some are whole conversations, with turns that both begin with.

    How an answer begins tells which is better, so that even a small model learns it for questions it has not seen.
    """
    made, rows = conversations(count), []
    for i, messages in enumerate(made):
        wrong = "No: " + made[(i + 7) % count][1]["content"].removeprefix("Yes: ")
        messages[-1]["content"] = f"Yes: {messages[-1]['content'].removeprefix('Yes: ')}"
        other = [*messages[:-1], {"role": "assistant", "content": wrong}]
        if len(messages) == 2 and i % 2:
            rows.append({"prompt": messages[0]["content"], "chosen": messages[1]["content"], "rejected": wrong})
        else:
            rows.append({"chosen": messages, "rejected": other})
    return rows


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    return write(place / "pairs.jsonl", pairs(60))


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return words(base, data, out, "--preset", "dpo", "--lr", "0.002", "--set", "data.sequence_length=320", *more)


@pytest.fixture(scope="module")
def whole(place: Path, base: Path, data: Path) -> Run:
    """The run that nothing happened to."""
    assert smolforge(command(base, data, place / "whole")) == 0
    return Run(place / "whole")


def messages_of(row: dict[str, Any], side: str) -> list[dict[str, str]]:
    if isinstance(row[side], list):
        return row[side]
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]


def log_probability(model: Any, template: ChatTemplate, messages: list[dict[str, str]]) -> tuple[torch.Tensor, int]:
    """Of the last answer, of the conversation alone."""
    ids, answers = template.encode_answers(messages)
    begin = len(template.encode(messages[:-1]))
    logits = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
    wanted = [i for i in range(begin, len(ids)) if answers[i]]
    return torch.stack([logits[i - 1, ids[i]] for i in wanted]).sum(), len(wanted)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_loss_and_gradients_are_those_of_a_plain_implementation(kind: str, whole: Run, base: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = build_config(str(whole.config_path), [f"preference.loss={kind}", "preference.beta=0.3"])
    module, tokenizer, directory = load_model(whole.path, dtype=torch.float32)
    plan = make_plan(config, torch.device("cpu"), 1)
    ours = build_model(config.model, **{**plan.model_options, "sparse_embedding": False})
    ours.load_state_dict(module.state_dict())
    reference = json.loads(whole.reference_path.read_text())
    with (
        Corpus.open(config.data, cache_dir=whole.path / "cache") as corpus,
        Loader(corpus, tokenizer, sequences_per_step=4, workers=0) as loader,
    ):
        batch = next(loader)
    ranks = DistributedContext()
    tokens = torch.from_numpy(batch.tokens).long()
    targets, _ = learned_targets(batch, tokens, ranks)
    assert targets is not None
    objective, count = Preferences(config, plan, reference, []).objective(batch, ranks)
    assert count == len(batch.documents) > 4
    ids, total = torch.from_numpy(batch.document_ids)[:, :-1].contiguous(), torch.zeros(())
    for rows in (slice(0, 1), slice(1, 4)):
        loss, part = objective(ours, rows, tokens[rows, :-1].contiguous(), targets[rows], ids[rows])
        loss.backward()
        total = total + part

    policy = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    template, losses = ChatTemplate(tokenizer), []
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for address in batch.documents:
        gains = []
        for side in ("chosen", "rejected"):
            messages = messages_of(rows[address.row], side)
            now, length = log_probability(policy, template, messages)
            with torch.no_grad():
                then, _ = log_probability(before, template, messages)
            gains.append((now - then) / (length if kind == "ipo" else 1))
        difference = gains[0] - gains[1]
        losses.append(-torch.log(torch.sigmoid(0.3 * difference)) if kind == "sigmoid" else (difference - 1 / 0.6) ** 2)
    mean = torch.stack(losses).mean()
    mean.backward()
    torch.testing.assert_close(total / count, mean.detach(), atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_the_margin_grows_on_held_out_pairs(whole: Run) -> None:
    scores = [row["validation"] for row in read_metrics(whole) if "validation" in row]
    assert scores[0]["margin"] == pytest.approx(0, abs=1e-5) and scores[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert scores[-1]["margin"] > 0.01 and scores[-1]["loss"] < scores[0]["loss"]
    first = next(row for row in read_metrics(whole) if "loss" in row)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert (whole.path / "report.html").is_file()


def test_the_held_out_margin_is_that_of_each_pair_alone(whole: Run, base: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = build_config(str(whole.config_path))
    _, tokenizer, directory = load_model(whole.path)
    now, then = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (directory, base))
    rows, template, margins = [json.loads(line) for line in data.read_text().splitlines()], ChatTemplate(tokenizer), []
    with Corpus.open(config.data, cache_dir=whole.path / "cache") as corpus, torch.no_grad():
        held_out = [document.address.row for document in corpus.documents(held_out=True)]
        counted = sum(int(each.pairs.sum()) for each in read_windows(corpus, tokenizer, 2, held_out=True))
        for row in held_out:
            sides = [messages_of(rows[row], side) for side in ("chosen", "rejected")]
            if sum(len(template.encode_answers(side).ids) for side in sides) > config.data.sequence_length + 1:
                continue
            gains = [log_probability(now, template, s)[0] - log_probability(then, template, s)[0] for s in sides]
            margins.append(config.preference.beta * float(gains[0] - gains[1]))
    score = [row["validation"] for row in read_metrics(whole) if "validation" in row][-1]
    assert counted == len(margins) > 1
    assert score["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert score["accuracy"] == pytest.approx(np.mean([margin > 0 for margin in margins]))


def test_losses_by_hand() -> None:
    sums, reference = torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -9.0]])
    counts = torch.tensor([[2.0, 4.0]])
    loss, margin = preference_losses(sums, reference, counts, PreferenceConfig(beta=0.5))
    assert float(margin) == pytest.approx(0.5 * (1 + 3)) and float(loss) == pytest.approx(np.log1p(np.exp(-2)))
    loss, _ = preference_losses(sums, reference, counts, PreferenceConfig(beta=0.5, loss="ipo"))
    assert float(loss) == pytest.approx((1 / 2 + 3 / 4 - 1) ** 2)


@pytest.mark.slow
def test_killed_in_the_middle_preferences_end_with_the_same_bytes(
    place: Path, base: Path, data: Path, whole: Run
) -> None:
    run = Run(place / "killed")
    kill_and_resume(command(base, data, run.path), run, whole=whole)
    assert run.reference_path.read_bytes() == whole.reference_path.read_bytes()


def test_a_lost_reference_is_made_again(place: Path, base: Path, data: Path) -> None:
    run = Run(place / "lost")
    assert smolforge(command(base, data, run.path, "--set", "training.steps=8")) == 0
    before = run.reference_path.read_bytes()
    run.reference_path.unlink()
    assert smolforge(command(base, data, run.path, "--set", "training.steps=12")) == 0
    assert run.reference_path.read_bytes() == before


@pytest.mark.slow
def test_two_ranks_learn_from_the_same_pairs(place: Path, base: Path, data: Path, whole: Run) -> None:
    run = Run(place / "ranks")
    run_on_two_ranks(command(base, data, run.path))
    assert [(step, digest) for step, _, digest in steps_of(run)] == [(s, d) for s, _, d in steps_of(whole)]
    np.testing.assert_allclose([x for _, x, _ in steps_of(run)], [x for _, x, _ in steps_of(whole)], rtol=2e-4)


def test_an_adapter_learns_preferences(place: Path, base: Path, data: Path) -> None:
    out = place / "adapter"
    more = ["--lora", "4", "--set", "training.steps=12", "--set", "optimizer.lr=0.02"]
    assert smolforge([*command(base, data, out), *more]) == 0
    scores = [row["validation"] for row in read_metrics(Run(out)) if "validation" in row]
    assert scores[-1]["margin"] > scores[0]["margin"] and (out / "checkpoints" / "last" / "adapter").is_dir()


def test_bad_pairs_are_one_error(place: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = pairs(8)

    def error(row: dict[str, Any]) -> str:
        path = write(place / "bad.jsonl", [*good, row])
        assert smolforge(["finetune", str(base), "--data", str(path), "--preset", "dpo", *QUICK,
                          "--out", str(place / "bad")]) == 2  # fmt: skip
        return capsys.readouterr().err

    assert "bad.jsonl, line 9 is not a pair of answers: it has 'prompt', 'chosen'" in error(
        {"prompt": "Why?", "chosen": "So."}
    )
    assert "line 9 has the same answer" in error({"prompt": "Why?", "chosen": "So.", "rejected": "So."})
    assert "line 9 has no question" in error({"chosen": "So.", "rejected": "No."})
    assert "empty" in error({"prompt": "Why?", "chosen": "So.", "rejected": ""})
    asked = [{"role": "user", "content": "Why?"}]
    assert "no message of the assistant" in error({"prompt": "Why?", "chosen": asked, "rejected": "No."})
    assert not (place / "bad" / "config.yaml").exists()
    with pytest.raises(BadRow):
        conversation_text({"messages": asked}, pair=True)


def test_a_change_of_the_loss_is_refused(
    base: Path, data: Path, whole: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights_of(whole)
    assert smolforge(command(base, data, whole.path, "--set", "preference.beta=0.2")) == 2
    assert "was started with 0.1, not 0.2" in capsys.readouterr().err
    assert weights_of(whole) == before
