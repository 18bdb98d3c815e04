"""Learning which of two answers is better: DPO (Rafailov et al. 2023, arXiv:2305.18290) and IPO (arXiv:2310.12036).

Each pair is two conversations that follow each other in one window. What counts of each is its log-probability, the sum
over the answer's tokens, beside that of the model that the run starts from, the reference. Those are computed once,
before the first step, and kept in RUN/reference.json by a hash of the tokens; no second model is in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smolforge.config import PreferenceConfig, RunConfig
from smolforge.data import Batch, Corpus
from smolforge.data.conversations import ChatEncoder, ChatWindow, encoded, pack
from smolforge.data.holdout import none_chosen
from smolforge.distributed import DistributedContext
from smolforge.errors import CheckpointError
from smolforge.files import read_json, write_atomically
from smolforge.model.architecture import CausalLM
from smolforge.model.loss import IGNORE, chunked_loss, native_chunk_loss, token_losses, torch_chunk_loss
from smolforge.run import Run
from smolforge.tokenizer import Tokenizer
from smolforge.training.plan import Plan
from smolforge.training.step import Objective

logger = logging.getLogger(__name__)

MAX_REFERENCE_BYTES = 1 << 30


@dataclass(frozen=True)
class Windows:
    """Windows of pairs as arrays (B, L + 1).

    A part is the conversation of its window that a token belongs to: 2 i is chosen, 2 i + 1 rejected, and a last one
    may be padding.
    """

    tokens: np.ndarray  # int32
    parts: np.ndarray
    learned: np.ndarray  # bool

    @classmethod
    def stack(cls, windows: Sequence[ChatWindow]) -> Windows:
        """The windows of a list."""
        parts = [np.repeat(np.arange(len(w.parts)), [len(part) for part in w.parts]) for w in windows]
        tokens = [np.concatenate(window.parts) for window in windows]
        return cls(np.stack(tokens), np.stack(parts), np.stack([window.learned for window in windows]))

    @property
    def pairs(self) -> np.ndarray:
        """How many pairs each window has, (B,)."""
        return (self.parts.max(1) + 1) // 2

    def hashes(self) -> Iterator[tuple[int, int, str]]:
        """(window, part, hash of its tokens and of which are learned) of each conversation."""
        for row, (tokens, parts, learned) in enumerate(zip(self.tokens, self.parts, self.learned, strict=True)):
            for part in range(2 * self.pairs[row]):
                mine = parts == part
                content = tokens[mine].astype("<i4").tobytes() + learned[mine].tobytes()
                yield row, part, hashlib.blake2b(content, digest_size=16).hexdigest()

    def spread(self) -> tuple[Tensor, Tensor]:
        """Targets (B, L), `IGNORE` where none is learned, and the part of each, one-hot fp32 (B, L, parts)."""
        targets = np.where(self.learned[:, 1:], self.tokens[:, 1:], IGNORE).astype(np.int64)
        width = 2 * max(int(self.pairs.max()), 1)
        return torch.from_numpy(targets), torch.from_numpy(self.parts[:, 1:, None] == np.arange(width)).float()


def preference_losses(
    sums: Tensor, reference: Tensor, counts: Tensor, config: PreferenceConfig
) -> tuple[Tensor, Tensor]:
    """Loss and margin of each pair, (...).

    Args:
        sums: (..., 2), log-probabilities of the chosen and the rejected answer.
        reference: (..., 2), the same of the reference.
        counts: (..., 2), tokens of the answers.

    Returns:
        The losses; and beta times how much more than the reference the model prefers the chosen answer.
    """
    gain = sums - reference
    margins = config.beta * (gain[..., 0] - gain[..., 1])
    if config.loss == "ipo":  # of the mean over tokens, as TRL has it
        mean = gain / counts.clamp(min=1)
        return (mean[..., 0] - mean[..., 1] - 1 / (2 * config.beta)).square(), margins
    return -F.logsigmoid(margins), margins


class Preferences:
    """The objective of a run on pairs, and its held-out score.

    Args:
        reference: log-probability of each conversation's answer by its hash.
        held_out: windows that training never sees.
    """

    def __init__(self, config: RunConfig, plan: Plan, reference: dict[str, float], held_out: list[Windows]) -> None:
        self.config, self.plan, self.reference, self.held_out = config, plan, reference, held_out

    def objective(self, batch: Batch, ranks: DistributedContext) -> tuple[Objective, int]:
        """What `train_step` differentiates for this batch, and the number of pairs in the global batch."""
        assert batch.learned is not None
        with ranks.together():
            windows = Windows(batch.tokens, batch.document_ids, batch.learned)
            reference, (_, spread) = self._reference_of(windows), windows.spread()
        count = max(sum(ranks.all_gather(int(windows.pairs.sum()))), 1)
        valid = torch.arange(reference.shape[1]) < torch.from_numpy(windows.pairs)[:, None]

        def compute(
            model: CausalLM, rows: slice, inputs: Tensor, targets: Tensor, ids: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            hidden, device = model.decoder(inputs, document_ids=ids).flatten(0, 1), inputs.device
            nats = token_losses(hidden.detach(), model.output_weight, targets.flatten()).requires_grad_()
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                scores = self._score(nats, targets, spread[rows].to(device), reference[rows].to(device))
                losses = torch.where(valid[rows].to(device), scores[0], 0.0).sum()
                (factors,) = torch.autograd.grad(losses / count, nats)
            # Each token's gradient counts as much as the pair's loss changes with it.
            loss, _ = chunked_loss(
                hidden, model.output_weight, targets.flatten(), scale=1.0, factors=factors,
                chunk_loss=native_chunk_loss if self.plan.loss == "native" else torch_chunk_loss,
            )  # fmt: skip
            return loss, losses.detach()

        return compute, count

    def _score(self, nats: Tensor, targets: Tensor, spread: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """As `preference_losses`, (B, pairs), of the losses of single tokens, (B L,)."""
        sums = -sum_parts(nats, spread).unflatten(1, (-1, 2))
        counts = sum_parts((targets != IGNORE).float(), spread).unflatten(1, (-1, 2))
        return preference_losses(sums, reference, counts, self.config.preference)

    def _reference_of(self, windows: Windows) -> Tensor:
        """(B, pairs, 2)."""
        found = np.zeros((len(windows.tokens), max(int(windows.pairs.max()), 1), 2), dtype=np.float32)
        for row, part, key in windows.hashes():
            if key not in self.reference:
                raise CheckpointError(
                    "reference.json of the run does not have a pair of its data",
                    hint="It was made with other data or another tokenizer. Remove it, and it is made again.",
                )
            found[row, part // 2, part % 2] = self.reference[key]
        return torch.from_numpy(found)

    @torch.no_grad()
    def validate(
        self, model: CausalLM, ranks: DistributedContext, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Mean loss and margin of the held-out pairs, and the share of them whose margin is above 0."""
        total = np.zeros(4)
        with ranks.together():
            for windows in self.held_out[ranks.rank :: ranks.world_size]:
                between()
                nats, targets, spread = run_windows(model, windows, self.plan.precision.context)
                losses, margins = self._score(nats, targets, spread, self._reference_of(windows).to(nats.device))
                valid = (np.arange(losses.shape[1]) < windows.pairs[:, None]).astype(float)
                for place, values in enumerate((losses, margins, margins > 0, torch.ones_like(losses))):
                    total[place] += (values.double().cpu().numpy() * valid).sum()
        loss, margin, right, count = np.sum(ranks.all_gather(total), axis=0)
        return {"loss": loss / count, "margin": margin / count, "accuracy": right / count}


def sum_parts(values: Tensor, spread: Tensor) -> Tensor:
    """The sum of the values of each part, (B, parts), of (B L,) or (B, L); always in the same order."""
    rows = values.view(spread.shape[0], 1, -1).float()
    return torch.bmm(rows, spread)[:, 0]


def run_windows(
    model: CausalLM, windows: Windows, context: Callable[[torch.device], AbstractContextManager[object]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the learned tokens (B L,), targets (B, L), and `spread` of the windows, on the model's device."""
    device = model.output_weight.device
    targets, spread = (tensor.to(device) for tensor in windows.spread())
    inputs = torch.from_numpy(windows.tokens[:, :-1].astype(np.int64)).to(device)
    ids = torch.from_numpy(np.ascontiguousarray(windows.parts[:, :-1]))
    with context(device):
        hidden = model.decoder(inputs, document_ids=ids).flatten(0, 1)
        return token_losses(hidden, model.output_weight, targets.flatten()), targets, spread


def read_windows(corpus: Corpus, tokenizer: Tokenizer, rows: int, *, held_out: bool) -> list[Windows]:
    """All pairs of one side in batches of `rows` windows."""
    encoder = ChatEncoder(tokenizer, corpus.config)
    found = [pair for pair in encoded(corpus, encoder, held_out=held_out) if encoder.usable(pair)]
    packed = pack(found, encoder.length, tokenizer.eos_id)
    return [Windows.stack(packed[start : start + rows]) for start in range(0, len(packed), rows)]


def open_preferences(
    run: Run, config: RunConfig, plan: Plan, corpus: Corpus, tokenizer: Tokenizer, model: CausalLM,
    ranks: DistributedContext,
) -> Preferences:  # fmt: skip
    """The objective of a run; computes the reference with `model`, which then has the weights of `init`.

    Raises:
        BadInput: no pair is held out though `data.holdout` asks for some.
    """
    held_out = read_windows(corpus, tokenizer, plan.micro_batch, held_out=True) if config.data.holdout else []
    if config.data.holdout and not held_out:
        raise none_chosen("pairs", "tune")
    path = run.reference_path
    known = ranks.broadcast(path.is_file() if ranks.is_main else None)
    if known:
        values = read_json(path, limit=MAX_REFERENCE_BYTES)
        return Preferences(config, plan, {str(key): float(value) for key, value in values.items()}, held_out)
    windows = [*held_out, *read_windows(corpus, tokenizer, plan.micro_batch, held_out=False)]
    reference: dict[str, float] = {}
    with ranks.together(), torch.no_grad():
        for each in windows[ranks.rank :: ranks.world_size]:
            nats, _, spread = run_windows(model, each, plan.precision.context)
            sums = -sum_parts(nats, spread)
            reference |= {key: float(sums[row, part]) for row, part, key in each.hashes()}
    for part in ranks.all_gather(reference):
        reference |= part
    with ranks.together():
        if ranks.is_main:
            write_atomically(path, json.dumps(dict(sorted(reference.items()))) + "\n")
    logger.info(f"reference: log-probabilities of {len(reference) // 2:,} pairs, kept in {path}")
    return Preferences(config, plan, reference, held_out)
