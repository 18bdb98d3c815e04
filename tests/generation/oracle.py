"""transformers' logits processors, as the oracle of our penalties and filters."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from smolforge.generation import SamplingParams


def filtered(scores: Tensor, params: SamplingParams) -> Tensor:
    """Scores (V,) after the filters that `params` asks for, in transformers' order; -inf where a token is dropped."""
    warpers = []
    if params.temperature != 1:
        warpers.append(theirs.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        warpers.append(theirs.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(theirs.MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        warpers.append(theirs.TypicalLogitsWarper(params.typical_p))
    scores = scores[None].clone()
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    return scores[0]
