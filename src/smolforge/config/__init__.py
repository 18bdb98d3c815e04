"""The typed configuration of a run: one tree, the same keys in YAML, in `--set` and in `config.yaml`.

A configuration is built from layers, later ones winning: the defaults, a preset or a YAML file, and `--set key=value`.
All errors are reported together, each with the closest valid key.

    sizes.py       counts and amounts of memory as people write them
    sections.py    the tree: keys, types, defaults, meanings
    keys.py        what keys there are: for errors and for docs/configuration.md
    layers.py      a configuration from presets, files and overrides
"""

from smolforge.config.keys import key_table
from smolforge.config.layers import build_config, preset_names, read_preset
from smolforge.config.sections import (
    THREE_PROMPTS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
)
from smolforge.config.sizes import parse_count

__all__ = [
    "THREE_PROMPTS", "DataConfig", "ModelConfig", "OptimizerConfig", "RunConfig", "ScheduleConfig", "TokenizerConfig",
    "build_config", "key_table", "parse_count", "preset_names", "read_preset",
]  # fmt: skip
