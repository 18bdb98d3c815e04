"""What changes where a run reads its text more than once: it would learn the text by heart.

Every value is a default: what the configuration gives stays as it is, and a run's configuration keeps the values.
"""

from __future__ import annotations

from smolforge.config import RunConfig

REPEATS = 1.5  # epochs from which on a text counts as repeated; an estimate of the size is not exact
# Strengths, by section and key; 0 and None leave the key as it is.
DEFAULTS = {
    ("training", "dropout"): 0.0,
    ("training", "ema"): 0.0,
    ("evaluation", "patience"): None,
}
DECAY = 1.0  # times the weight decay that the run has otherwise


def resolve_small_corpus(given: RunConfig, config: RunConfig, epochs: float) -> tuple[RunConfig, list[str]]:
    """`config` with the defaults of a repeated text, and a line for people about them.

    Args:
        given: the configuration as the user gave it, before anything was derived.
        epochs: how often the run reads its text.
    """
    if epochs < REPEATS:
        return config, []
    changes = {place: value for place, value in DEFAULTS.items() if value}
    if config.optimizer.weight_decay and DECAY != 1:
        changes["optimizer", "weight_decay"] = float(f"{DECAY * config.optimizer.weight_decay:.2g}")
    told = []
    for (section, key), value in changes.items():
        if key not in getattr(given, section).model_fields_set:
            config = config.with_keys(section, **{key: value})
            told.append(f"{section}.{key}={value:g}")
    line = f"small corpus: what is read {epochs:.2g} times is partly learned by heart; expect the training loss to end "
    line += f"below the held-out one, which counts{'; ' if told else ''}{', '.join(told)}"
    return config, [line]
