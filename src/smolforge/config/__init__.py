"""The typed configuration of a run: one tree, the same keys in YAML, in `--set` and in `config.yaml`.

A configuration is built from layers, later ones winning: the defaults, a preset or a YAML file, and `--set key=value`.
All errors are reported together, each with the closest valid key.

    values.py      counts as people write them; the base of all sections
    sections.py    the tree: keys, types, defaults, meanings
    layers.py      a configuration from presets, files and overrides; its errors; the table of all keys
"""

from smolforge.config.layers import build_config, key_records, key_table, preset_about, preset_names, read_preset
from smolforge.config.sections import (
    THREE_PROMPTS,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PreferenceConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
)
from smolforge.config.values import parse_count

__all__ = [
    "THREE_PROMPTS", "DataConfig", "LoraConfig", "ModelConfig", "OptimizerConfig", "PreferenceConfig", "RunConfig",
    "ScheduleConfig", "TokenizerConfig", "build_config", "key_records", "key_table", "parse_count", "preset_about",
    "preset_names", "read_preset",
]  # fmt: skip
