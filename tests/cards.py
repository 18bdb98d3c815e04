"""GPUs that are not there: what `torch.cuda` says of a machine that has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class Card:
    """A GPU: its name as torch has it, bytes of memory, compute capability."""

    name: str
    memory: int
    capability: tuple[int, int]


CARDS = {
    "H100": Card("NVIDIA H100 80GB HBM3", 85_024_112_640, (9, 0)),
    "4090": Card("NVIDIA GeForce RTX 4090", 25_386_352_640, (8, 9)),
    "T4": Card("Tesla T4", 15_655_829_504, (7, 5)),
}


def insert_cards(
    cards: Sequence[Card], *, error: str = "No CUDA GPUs are available", put: Callable[..., None] = setattr
) -> None:
    """Let a build without CUDA say that it has these GPUs; without any, that starting CUDA fails with `error`.

    `put` is `setattr`, or `monkeypatch.setattr` where it has to be undone.
    """

    def card(device: Any = None) -> Card:
        index = device if isinstance(device, int) else getattr(device, "index", None)
        return cards[index or 0]

    def start() -> None:
        if not cards:
            raise RuntimeError(error)

    def properties(device: Any = None) -> SimpleNamespace:
        found = card(device)
        major, minor = found.capability
        return SimpleNamespace(name=found.name, total_memory=found.memory, major=major, minor=minor)

    fakes = {
        "is_available": lambda: bool(cards),
        "init": start,
        "device_count": lambda: len(cards),
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: card(device).name,
        "get_device_capability": lambda device=None: card(device).capability,
        "get_device_properties": properties,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90a"],
        "Event": lambda: SimpleNamespace(record=lambda stream: None, synchronize=lambda: None),
        "current_stream": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or card().capability >= (8, 0),
    }
    put(torch.version, "cuda", "12.8")
    for name, fake in fakes.items():
        put(torch.cuda, name, fake)
