"""One batch beside TRL: loss and gradients of SFT, loss and rewards of DPO. It needs `pip install trl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_files import conversations, rows_of, write
from chat_runs import make_base

from smolforge.chat_template import ChatTemplate
from smolforge.checkpoint.format import read_config
from smolforge.checkpoint.locate import load_model
from smolforge.config import build_config
from smolforge.data import Batch, Corpus, Loader
from smolforge.data.readers.conversation import PREFERENCES
from smolforge.distributed import DistributedContext
from smolforge.model.architecture import CausalLM
from smolforge.tokenizer import Tokenizer
from smolforge.training.finetuning import learned_targets
from smolforge.training.plan import Plan, make_plan
from smolforge.training.preferences import Preferences, Windows, preference_losses, run_windows, sum_parts

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")

# A turn ends with its special token: TRL counts what a template adds after it as part of the answer.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_base(tmp_path_factory.mktemp("trl") / "base", max_position_embeddings=1024)
    config = json.loads((path / "tokenizer_config.json").read_text())
    changed = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config | changed))
    return path


def theirs(base: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)


def settings(place: Path) -> dict[str, Any]:
    return {
        "output_dir": str(place), "per_device_train_batch_size": 8, "report_to": [], "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "max_length": None, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def our_batch(base: Path, data: Path, format: str) -> tuple[CausalLM, Plan, Any, Batch]:
    """Two windows of conversations; a small file comes round, so some are in them twice."""
    overrides = ["data.holdout=0", f"data.format={format}", "training.precision=fp32", "training.compile=off",
                 "data.lanes=1", "data.sequence_length=1024", "training.micro_batch=1"]  # fmt: skip
    config = build_config("sft", overrides, init=str(base), data={"sources": {str(data): 1.0}})
    config = config.model_copy(update={"model": read_config(base)})
    module, tokenizer, _ = load_model(base)
    with (
        Corpus.open(config.data, cache_dir=base / "cache") as corpus,
        Loader(corpus, tokenizer, sequences_per_step=2, workers=0) as loader,
    ):
        batch = next(loader)
    module.train()
    return module, make_plan(config, torch.device("cpu"), 1), config, batch


def rows_in(batch: Batch, rows: list[dict[str, Any]], base: Path) -> list[dict[str, Any]]:
    """The rows whose conversations are in the batch, as often as they are."""
    template = ChatTemplate(Tokenizer.from_pretrained(base))
    sides = [[row["messages"]] if "messages" in row else [row["prompt"] + row[x] for x in PREFERENCES] for row in rows]
    known = {tuple(i for side in both for i in template.encode_answers(side).ids): n for n, both in enumerate(sides)}
    found, width = [], len(sides[0])
    for tokens, parts in zip(batch.tokens, batch.document_ids, strict=True):
        for first in range(0, int(parts.max()), width):
            mine = tuple(tokens[(parts >= first) & (parts < first + width)].tolist())
            found += [rows[known[mine]]] if mine in known else []
    return found


def test_loss_and_gradients_of_sft(base: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    made = conversations(24)
    data = write(tmp_path / "chat.jsonl", rows_of(made))
    module, _, _, batch = our_batch(base, data, "chat")
    tokens = torch.from_numpy(batch.tokens).long()
    targets, count = learned_targets(batch, tokens, DistributedContext())
    assert targets is not None and count is not None
    ids = torch.from_numpy(batch.document_ids)[:, :-1].contiguous()
    loss, _ = module.loss(tokens[:, :-1].contiguous(), targets, document_ids=ids, scale=1 / count)
    loss.backward()

    model, tokenizer = theirs(base)
    rows = rows_in(batch, rows_of(made), base)
    config = trl.SFTConfig(assistant_only_loss=True, packing=False, **settings(tmp_path / "sft"))
    trainer = trl.SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    assert int((inputs["labels"] != -100).sum()) == count
    found = trainer.compute_loss(trainer.model, inputs)
    found.backward()
    torch.testing.assert_close(loss, found, atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad.to_dense(), gradients[name], atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_loss_and_rewards_of_dpo(kind: str, base: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    made = [each for each in conversations(40) if len(each) == 2]
    rows = [
        {"prompt": each[:1], "chosen": each[1:], "rejected": made[(i + 5) % len(made)][1:]}
        for i, each in enumerate(made)
    ]
    module, plan, config, batch = our_batch(base, write(tmp_path / "pairs.jsonl", rows), "preferences")
    config.preference.beta, config.preference.loss = 0.3, kind
    assert batch.learned is not None
    windows = Windows(batch.tokens, batch.document_ids, batch.learned)
    with torch.no_grad():
        nats, _, spread = run_windows(module, windows, plan.precision.context)
        sums = -sum_parts(nats, spread)
        reference = {key: float(sums[row, part]) for row, part, key in windows.hashes()}
        generator = torch.Generator().manual_seed(1)
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    tokens = torch.from_numpy(batch.tokens).long()
    targets, _ = learned_targets(batch, tokens, DistributedContext())
    assert targets is not None
    objective, count = Preferences(config, plan, reference, []).objective(batch, DistributedContext())
    ids = torch.from_numpy(batch.document_ids)[:, :-1].contiguous()
    loss, losses = objective(module, slice(None), tokens[:, :-1].contiguous(), targets, ids)
    loss.backward()
    chosen = rows_in(batch, rows, base)
    assert count == len(chosen) > 4
    with torch.no_grad():
        nats, _, spread = run_windows(module, windows, plan.precision.context)
    now = -sum_parts(nats, spread)
    rewards = [0.3 * (float(now[row, part]) - reference[key]) for row, part, key in windows.hashes()]

    model, tokenizer = theirs(base)
    before, _ = theirs(base)
    model.load_state_dict(module.state_dict(), strict=False)
    arguments = trl.DPOConfig(beta=0.3, loss_type=[kind], **settings(tmp_path / "dpo"))
    trainer = trl.DPOTrainer(
        model=model, ref_model=before, args=arguments, train_dataset=Dataset.from_list(chosen),
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(chosen))])
    found = trainer.compute_loss(trainer.model, inputs)
    found.backward()
    torch.testing.assert_close(losses / count, found.detach(), atol=1e-5, rtol=1e-5)
    metrics = trainer._metrics["eval"]  # that is the mode of a model that was just loaded
    assert metrics["rewards/chosen"][0] == pytest.approx(sum(rewards[::2]) / count, abs=1e-5)
    assert metrics["rewards/rejected"][0] == pytest.approx(sum(rewards[1::2]) / count, abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad.to_dense(), gradients[name], atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]
    assert preference_losses(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), config.preference)[1] == 0
