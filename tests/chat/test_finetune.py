"""Tuning: loss and gradients are those of transformers on each conversation alone; E1 and E2 hold as in pretraining."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_files import conversations, rows_of, write
from chat_runs import QUICK, SHAPE, kill_and_resume, run_on_two_ranks, steps_of, words
from chat_templates import ENDLESS, EOS, SPECIALS, TEMPLATES

from smolforge import tales
from smolforge.chat_template import CHATML, ChatTemplate
from smolforge.checkpoint.format import write_model
from smolforge.checkpoint.locate import load_model
from smolforge.cli import run as smolforge
from smolforge.config import build_config
from smolforge.data import Corpus, Loader
from smolforge.distributed import DistributedContext
from smolforge.generation.engine import Engine
from smolforge.metrics_log import read_metrics
from smolforge.model.architecture import build_model
from smolforge.run import Run
from smolforge.tokenizer import Tokenizer
from smolforge.training.finetuning import learned_targets, resolve_chat, with_chat_template
from smolforge.training.plan import make_plan


@pytest.fixture(scope="module")
def whole(place: Path, base: Path, data: Path) -> Run:
    """The run that nothing happened to."""
    assert smolforge(words(base, data, place / "whole")) == 0
    return Run(place / "whole")


def test_a_dry_run_tells_what_is_learned_and_writes_nothing(place: Path, base: Path, data: Path, capsys) -> None:
    assert smolforge([*words(base, data, place / "dry"), "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert all(said in told for said in ("are learned, in", "⟦", "batch: ", "learning rate", "dry run: nothing"))
    assert not (place / "dry").exists()


def test_a_base_model_gets_chatml_and_learns_to_answer(whole: Run) -> None:
    config = build_config(str(whole.config_path))
    assert config.training.steps == len(steps_of(whole)) > 8
    losses = [loss for _, loss, _ in steps_of(whole)]
    assert losses[-1] < losses[0]
    module, tokenizer, directory = load_model(whole.path)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.chat_template == CHATML and tokenizer.eos_id == end and module.config.vocab_size == 420
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == end
    # The questions of the samples are held out, and asked in the template.
    assert config.samples.prompts and all(prompt.startswith("Question ") for prompt in config.samples.prompts)
    card = (directory / "README.md").read_text()
    assert "conversations" in card and "not taught to follow instructions" not in card
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    asked = [{"role": "user", "content": "Why?"}]
    ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer.encode_chat(asked)


def test_so_few_steps_that_they_learn_little_are_told(
    place: Path, base: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="smolforge")
    tokenizer = with_chat_template(Tokenizer.from_pretrained(base))
    keys = ["data.sequence_length=128", "training.tokens_per_step=512"]
    for more, steps in (["training.epochs=1"], 10), ([], 29):
        config = build_config("sft", [*keys, *more], init=str(base), data={"sources": {str(data): 1.0}})
        with Corpus.open(config.data, cache_dir=place / "cache") as corpus:
            assert resolve_chat(config, corpus, tokenizer, DistributedContext()).total_steps == steps
    assert [line for line in caplog.messages if "learn little" in line] == [
        "length: so few steps learn little; --epochs 3 makes 20 or more"
    ]


def test_special_tokens_that_a_tokenizer_lacks_grow_the_embedding(place: Path, data: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    shape = SHAPE.model_copy(update={"vocab_size": 257, "max_position_embeddings": 512})
    model = build_model(shape, seed=1)
    write_model(place / "bytes", shape, model.state_dict(), Tokenizer(backend))
    quick = [*QUICK, "--set", "training.steps=1", "--set", "data.sequence_length=256", "--lr", "1e-9"]
    command = ["finetune", str(place / "bytes"), "--data", str(data), "--out", str(place / "grown"), *quick]
    assert smolforge(command) == 0
    tuned, tokenizer, _ = load_model(place / "grown")
    assert tokenizer.vocab_size == tuned.config.vocab_size == 259
    embedding, before = tuned.decoder.embed_tokens.weight, model.decoder.embed_tokens.weight
    torch.testing.assert_close(embedding[:257], before, atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding[257:], before.mean(0).expand(2, -1), atol=1e-5, rtol=0)


def test_loss_and_gradients_are_those_of_transformers_on_each_conversation(whole: Run, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = build_config(str(whole.config_path))
    module, tokenizer, directory = load_model(whole.path, dtype=torch.float32)
    plan = make_plan(config, torch.device("cpu"), 1)
    ours = build_model(config.model, **{**plan.model_options, "sparse_embedding": False})
    ours.load_state_dict(module.state_dict())
    with (
        Corpus.open(config.data, cache_dir=whole.path / "cache") as corpus,
        Loader(corpus, tokenizer, sequences_per_step=4, workers=0) as loader,
    ):
        batch = next(loader)
    tokens = torch.from_numpy(batch.tokens).long()
    targets, count = learned_targets(batch, tokens, DistributedContext())
    assert targets is not None and count is not None
    ids = torch.from_numpy(batch.document_ids)[:, :-1].contiguous()
    loss, nats = ours.loss(tokens[:, :-1].contiguous(), targets, document_ids=ids, scale=1 / count)
    loss.backward()

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    template = ChatTemplate(tokenizer)
    total, learned = torch.zeros(()), 0
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for address in batch.documents:
        # Rows of the file: one row group holds them all.
        alone, answers = template.encode_answers(rows[address.row]["messages"])
        labels = torch.tensor([alone]).masked_fill(~torch.tensor([answers]), -100)
        logits = theirs(torch.tensor([alone])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        learned += sum(answers)
    (total / learned).backward()
    assert learned == count
    torch.testing.assert_close(loss, total / learned, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nats, total.detach(), atol=1e-3, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_the_held_out_loss_is_that_of_the_answers_alone(whole: Run) -> None:
    config = build_config(str(whole.config_path))
    module, tokenizer, _ = load_model(whole.path)
    template, nats, count = ChatTemplate(tokenizer), 0.0, 0
    with Corpus.open(config.data, cache_dir=whole.path / "cache") as corpus, torch.no_grad():
        for document in corpus.documents(held_out=True):
            ids, answers = template.encode_answers(json.loads(document.text)["messages"])
            if len(ids) > config.data.sequence_length + 1:
                continue
            logits = module(torch.tensor([ids]))[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            nats += float(losses[torch.tensor(answers[1:])].sum())
            count += sum(answers)
    recorded = [row["validation"]["loss"] for row in read_metrics(whole) if "validation" in row]
    assert count > 20 and recorded[-1] == pytest.approx(nats / count, rel=1e-5)


def test_what_ends_a_turn_ends_a_text(base: Path) -> None:
    """Base models have another end-of-text token than their chat template has for a turn."""
    backend = Tokenizer.from_pretrained(base).backend
    backend.add_special_tokens(SPECIALS)
    for name, (template, *_) in TEMPLATES.items():
        before = Tokenizer(backend, {"eos_token": "<|endoftext|>", "bos_token": "<s>", "chat_template": template})
        after = with_chat_template(before)
        expected = EOS[name] if "eos_token" not in template else "<|endoftext|>"
        assert after.token_text(after.eos_id) == expected, name
        assert after.bos_id == before.bos_id and after.chat_template == template
    strange = Tokenizer(backend, {"eos_token": "<|endoftext|>", "chat_template": ENDLESS})
    assert with_chat_template(strange).eos_id == strange.eos_id


def test_killed_in_the_middle_it_ends_with_the_same_bytes(place: Path, base: Path, data: Path, whole: Run) -> None:
    run = Run(place / "killed")
    kill_and_resume(words(base, data, run.path), run, whole=whole)


def test_two_ranks_learn_from_the_same_batches(place: Path, base: Path, data: Path, whole: Run) -> None:
    run = Run(place / "ranks")
    run_on_two_ranks(words(base, data, run.path))
    one, two = steps_of(whole), steps_of(run)
    assert [(step, digest) for step, _, digest in two] == [(step, digest) for step, _, digest in one]
    np.testing.assert_allclose([loss for _, loss, _ in two], [loss for _, loss, _ in one], rtol=2e-4)


def test_what_a_run_is_cannot_be_changed(
    base: Path, data: Path, whole: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smolforge(words(base, data, whole.path, "--set", "data.loss_on=all")) == 2
    assert "was started with assistant, not all" in capsys.readouterr().err
    assert smolforge(words(base, data, whole.path)) == 0
    assert "already has" in capsys.readouterr().err


def test_bad_requests_are_one_error(place: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert smolforge([*arguments, "--out", str(place / "bad")]) != 0
        return capsys.readouterr().err

    assert "data.holdout" in error(*words(base, write(place / "one.jsonl", rows_of(conversations(1))), place)[:4])
    text = place / "text.jsonl"
    text.write_text('{"text": "Once"}\n')
    assert "text.jsonl, first line is not a conversation" in error("finetune", str(base), "--data", str(text))
    assert "--lr: -1.0 must be above 0" in error("finetune", str(base), "--data", str(data), "--lr", "-1")
    assert "needs a model to start from" in error("train", "sft", "--data", str(data))
    assert not (place / "bad" / "config.yaml").exists()


def test_which_conversations_fed_a_step(whole: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert smolforge(["data", "which", str(whole.path), "--step", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["documents"]
    assert found and all(each["file"] == "chat.jsonl" and 0 <= each["row"] < 60 for each in found)


def test_the_answer_of_a_tuned_model_stops(place: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One question and one answer, learned by heart."""
    pair: list[Any] = [{"prompt": "Where is the fox?", "completion": "In the wood."}] * 40
    data = write(place / "fox.jsonl", pair)
    command = ["finetune", str(base), "--data", str(data), "--out", str(place / "fox"), *QUICK]
    more = ["--lr", "0.01", "--set", "data.holdout=0", "--set", "training.steps=60", "--set", "samples.every=60"]
    assert smolforge([*command, *more]) == 0
    engine = Engine.from_pretrained(place / "fox")
    outputs = list(engine.stream([engine.tokenizer.encode_chat([{"role": "user", "content": "Where is the fox?"}])]))
    assert "".join(output.text for output in outputs) == "In the wood."
    assert outputs[-1].finish_reason == "stop"


def test_dialogues_of_tales_and_what_is_learned_of_them(
    place: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "dialogues.jsonl"
    assert smolforge(["data", "write", str(path), "--documents", "5", "--chat"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [tales.document(i).prompt for i in range(5)]
    assert all(tales.document(i).text.startswith(row["completion"] + "\n\n") for i, row in enumerate(rows))
    assert smolforge(["data", "write", str(place / "d.txt"), "--chat"]) == 2
    capsys.readouterr()
    assert smolforge(["data", "show", str(path), "--model", str(base), "--count", "2", "--set", "data.holdout=0"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("dialogues.jsonl, row group 0, row") == 2
    assert f"<|im_start|>assistant\n⟦{rows[0]['completion']}<|im_end|>⟧\n" in shown.out
    assert "5 conversations in an epoch" in shown.err
