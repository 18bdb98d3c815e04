"""The documents of a packed batch: positions that start anew in each, and masks that attention stops at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smolforge.devices import to_device
from smolforge.model.attention import Attend


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Positions that start anew with each document, (B, T)."""
    place = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return place - torch.where(_starts(document_ids), place, 0).cummax(dim=1).values


def _starts(document_ids: Tensor) -> Tensor:
    """Where a document begins, (B, T)."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def causal_mask(document_ids: Tensor) -> Tensor:
    """True where a query may look: not later, and in the same document. (B, T) → (B, 1, T, T)."""
    length = document_ids.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (earlier & same)[:, None]


def document_borders(document_ids: Tensor) -> Tensor:
    """Where each document of (B, T) begins if the rows are laid end to end, and where the last ends: (N + 1,) int32.

    N is a power of two, and at least 8 B: empty documents at the end fill it up, so that compiled code meets few
    shapes. On a GPU counting would make the host wait, so the ids come from the host.
    """
    first = _starts(document_ids).flatten().nonzero()[:, 0]
    length = max(8 * len(document_ids), 1 << (len(first) - 1).bit_length())
    return F.pad(first, (0, length + 1 - len(first)), value=document_ids.numel()).int()


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, as the model needs them on its device.

    Attributes:
        positions: (B, T), of `positions_in_documents`.
        mask: of `document_mask`.
    """

    positions: Tensor
    mask: Tensor

    @classmethod
    def of(cls, way: str | Attend, document_ids: Tensor, device: torch.device, dtype: torch.dtype) -> Documents:
        """Of ids (B, T), best on the host, for a key of `ATTENTION` and the precision of the hidden states."""
        positions = positions_in_documents(to_device(document_ids, device))
        return cls(positions, document_mask(way, document_ids, device, dtype))


def document_mask(way: str | Attend, document_ids: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The mask of documents (B, T) for a key of `ATTENTION`, on a device.

    For varlen `document_borders`; for expanded what is added to the scores, (B, 1, T, T), made once for all layers;
    otherwise `causal_mask`.
    """
    if way == "varlen":
        return to_device(document_borders(document_ids), device)
    mask = causal_mask(to_device(document_ids, device))
    if way == "expanded":
        return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, -torch.inf)
    return mask
