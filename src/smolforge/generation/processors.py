"""Each way of bending a distribution, as one small function from scores to scores.

A maker takes its setting and returns a closure over the last dimension of a float tensor (..., V); what a
filter drops becomes -inf. Formulas, borders and order are those of transformers' logits processors, so that a
setting means here what it means there; `chain` puts them in `GenerationMixin`'s order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from smolforge.generation.sampling_params import SamplingParams

Processor = Callable[[Tensor], Tensor]
NEVER = float("-inf")


def temperature(value: float) -> Processor:
    """Divide by `value` > 0: below 1 sharper, above 1 flatter."""
    return lambda scores: scores / value


def top_k(k: int) -> Processor:
    """Keep the k highest scores, and all that equal the k-th."""

    def warp(scores: Tensor) -> Tensor:
        least = torch.topk(scores, min(k, scores.shape[-1])).values[..., -1:]
        return scores.masked_fill(scores < least, NEVER)

    return warp


def top_p(mass: float) -> Processor:
    """Keep the likeliest tokens until their probability reaches `mass` (Holtzman et al. 2020)."""

    def warp(scores: Tensor) -> Tensor:
        ordered, index = torch.sort(scores, descending=False)
        below = ordered.softmax(-1).cumsum(-1)
        drop = below <= 1 - mass
        drop[..., -1:] = False  # the likeliest always stays
        return scores.masked_fill(drop.scatter(-1, index, drop), NEVER)

    return warp


def min_p(share: float) -> Processor:
    """Drop tokens less likely than `share` of the likeliest (Nguyen et al. 2024)."""

    def warp(scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        drop = probabilities < share * probabilities.amax(-1, keepdim=True)
        return scores.masked_fill(drop, NEVER)

    return warp


def typical(mass: float) -> Processor:
    """Keep the tokens whose surprise is nearest the entropy, until `mass` (Meister et al. 2022)."""

    def warp(scores: Tensor) -> Tensor:
        logs = scores.log_softmax(-1)
        entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
        distance, index = torch.sort((-logs - entropy).abs(), descending=False)
        reached = scores.gather(-1, index).softmax(-1).cumsum(-1)
        last = (reached < mass).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        drop = distance > distance.gather(-1, last)
        return scores.masked_fill(drop.scatter(-1, index, drop), NEVER)

    return warp


def repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens `seen` (ids, once each) less likely: divide positive scores, multiply negative ones."""
    scores = scores.clone()
    values = scores[seen]
    scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    return scores


def frequency_and_presence(
    scores: Tensor, written: Tensor, counts: Tensor, frequency: float, presence: float
) -> Tensor:
    """OpenAI's penalties: `counts` times `frequency`, and `presence` once, off each token `written`."""
    scores = scores.clone()
    scores[written] -= counts * frequency + presence
    return scores


def bias(values: Mapping[int, float]) -> Processor:
    """Add to the scores of single tokens."""
    ids, amounts = torch.tensor(list(values)), torch.tensor(list(values.values()), dtype=torch.float32)

    def process(scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[..., ids] += amounts
        return scores

    return process


def forbid(ids: list[int]) -> Processor:
    """Make tokens impossible."""
    index = torch.tensor(ids, dtype=torch.long)

    def process(scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[..., index] = NEVER
        return scores

    return process


def chain(sampling: SamplingParams) -> list[Processor]:
    """The filters that `sampling` asks for, in transformers' order: temperature, top-k, top-p, min-p, typical."""
    steps: list[Processor] = []
    if sampling.temperature not in (0, 1):
        steps.append(temperature(sampling.temperature))
    if sampling.top_k:
        steps.append(top_k(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(top_p(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(min_p(sampling.min_p))
    if sampling.typical_p < 1:
        steps.append(typical(sampling.typical_p))
    return steps
