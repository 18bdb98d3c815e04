"""Short names of datasets on the Hub, each for one source or for several with their shares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_CORPUS = "HuggingFaceTB/smollm-corpus"
NAMES: dict[str, dict[str, float]] = {
    "cosmopedia-v2": {f"{_CORPUS}:cosmopedia-v2": 1.0},
    "fineweb-edu": {"HuggingFaceFW/fineweb-edu:sample-10BT": 1.0},
    "dclm-edu": {"hf://datasets/HuggingFaceTB/dclm-edu/data/*.parquet": 1.0},
    # The first 100 of 6,543 shuffled shards: the index of a run reads the footer of each.
    "climbmix": {"hf://datasets/karpathy/climbmix-400b-shuffle/shard_000*.parquet": 1.0},
    # 0.7 and 0.15 in config_smollm1_135M.yaml (github.com/huggingface/smollm); its code parts have no text on the Hub.
    "smollm-corpus": {f"{_CORPUS}:fineweb-edu-dedup": 0.7 / 0.85, f"{_CORPUS}:cosmopedia-v2": 0.15 / 0.85},
}


def expand_names(sources: Mapping[str, float]) -> dict[str, float]:
    """`sources` with each short name replaced by what it stands for; a path that exists is not a name."""
    expanded: dict[str, float] = {}
    for source, weight in sources.items():
        parts = {source: 1.0} if Path(source).exists() else NAMES.get(source, {source: 1.0})
        for part, share in parts.items():
            expanded[part] = expanded.get(part, 0.0) + weight * share
    return expanded
