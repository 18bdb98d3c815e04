"""From logits to a token: one uniform number per token, looked up in the cumulative distribution.

The uniform of token t of choice c is a hash of (seed, c, t). There is no generator state, so a request's
text cannot depend on what else runs, on the order of requests, or on tokens that were drafted and thrown away.

Sorting 49,152 logits costs 3 ms, so filters look at the highest few first (`_shortlist`) and fall back to the
whole vocabulary only where those few do not decide. Both ways keep the same tokens and draw in order of id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smolforge.generation import processors
from smolforge.generation.sampling import Sampling

SHORTLISTS = (64, 1024)
NO_TOP: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Picked:
    """One drawn token, with the model's own (unfiltered, temperature 1) log-probabilities if asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = NO_TOP


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) that is a pure function of its address, with 53 random bits."""
    address = struct.pack("<QII", seed % 2**64, choice, index)
    return (int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little") >> 11) * 2.0**-53


class Sampler:
    """Draws the tokens of one choice of one request.

    Args:
        sampling: the request's settings.
        prompt: ids of the prompt, which the repetition penalty sees.
        seed: of the request.
        choice: index of the continuation, 0 <= choice < n.
        end_ids: tokens that end the text, impossible before `sampling.min_tokens`.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], seed: int, choice: int = 0, end_ids: Sequence[int] = ()
    ) -> None:
        self.sampling = sampling
        self.seed, self.choice = seed, choice
        self._written: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._bias = processors.bias(sampling.logit_bias) if sampling.logit_bias else None
        self._forbid = processors.forbid(list(end_ids)) if end_ids and sampling.min_tokens else None
        self._chain = processors.chain(sampling)

    def observe(self, token_id: int) -> None:
        """Count a token that was really written."""
        self._written[token_id] += 1
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token_id)

    def pick(self, logits: Tensor, index: int) -> Picked:
        """Draw token number `index` of this choice from the model's logits (V,), which are left as they are."""
        scores = self._penalise(logits, index)
        if self.sampling.greedy:
            token_id = int(scores.argmax())
        else:
            token_id = draw(*self.distribution(scores), uniform(self.seed, self.choice, index))
        if self.sampling.logprobs is None:
            return Picked(token_id)
        return describe(logits, token_id, self.sampling.logprobs)

    def distribution(self, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(ids ascending, probabilities in float64) of the tokens that the filters keep of scores (V,)."""
        kept = _shortlist(scores, self.sampling)
        if kept is None:
            for process in self._chain:
                scores = process(scores)
            ids = torch.nonzero(scores > processors.NEVER).flatten()
            kept = ids.numpy(), scores[ids].double().numpy()
        ids, values = kept
        weights = np.exp(values - values.max())
        return ids, weights / weights.sum()

    def _penalise(self, scores: Tensor, index: int) -> Tensor:
        s = self.sampling
        if s.repetition_penalty != 1 and self._seen:
            scores = processors.repetition(scores, torch.tensor(sorted(self._seen)), s.repetition_penalty)
        if (s.frequency_penalty or s.presence_penalty) and self._written:
            ids = torch.tensor(list(self._written))
            counts = torch.tensor(list(self._written.values()), dtype=scores.dtype)
            scores = processors.frequency_and_presence(scores, ids, counts, s.frequency_penalty, s.presence_penalty)
        if self._bias is not None:
            scores = self._bias(scores)
        if self._forbid is not None and index < s.min_tokens:
            scores = self._forbid(scores)
        return scores


def draw(ids: np.ndarray, probabilities: np.ndarray, u: float) -> int:
    """The id whose interval of the cumulative distribution holds u in [0, 1)."""
    cumulative = np.cumsum(probabilities)
    position = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(ids[min(position, len(ids) - 1)])


def describe(logits: Tensor, token_id: int, top: int) -> Picked:
    """A token with its log-probability and the `top` likeliest alternatives, under plain softmax of logits (V,)."""
    total = torch.logsumexp(logits, -1)
    best = torch.topk(logits, top) if top else None
    alternatives = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True) if best else ()
    return Picked(token_id, float(logits[token_id] - total), tuple(alternatives))


def _shortlist(scores: Tensor, sampling: Sampling) -> tuple[np.ndarray, np.ndarray] | None:
    """(ids ascending, scores / temperature) that the filters keep, found among the highest few scores.

    None where the few do not decide: a filter would keep the last of them, so it might keep others too.
    """
    if sampling.typical_p < 1 or not (sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0):
        return None
    total: float | None = None
    for size in SHORTLISTS:
        if size >= scores.shape[-1]:
            return None
        if sampling.top_k >= size:
            continue
        best = torch.topk(scores, size)
        values = best.values.double().numpy() / sampling.temperature
        keep = np.ones(size, dtype=bool)
        if sampling.top_k:
            keep &= values >= values[sampling.top_k - 1]
            if keep[-1]:  # as likely as the k-th: there may be more of them
                continue
        if sampling.top_p < 1:
            if sampling.top_k:
                denominator = np.exp(values[keep] - values[0]).sum()
            else:
                if total is None:
                    total = float(torch.logsumexp(scores / sampling.temperature, -1))
                denominator = np.exp(total - values[0])
            probabilities = np.where(keep, np.exp(values - values[0]), 0.0) / denominator
            before = np.concatenate(([0.0], np.cumsum(probabilities)[:-1]))
            keep &= before < sampling.top_p
            keep[0] = True
        if sampling.min_p > 0:
            keep &= np.exp(values - values[0]) >= sampling.min_p
        if keep[-1]:
            continue
        ids = best.indices.numpy()[keep]
        order = np.argsort(ids)
        return ids[order], values[keep][order]
    return None
