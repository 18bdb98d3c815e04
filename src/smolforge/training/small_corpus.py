"""What changes where a run reads its text more than once: it would learn the text by heart.

Every value is a default: what the configuration gives stays as it is, and a run's configuration keeps the values.
"""

from __future__ import annotations

from smolforge.config import RunConfig
from smolforge.training.recipe import count_body
from smolforge.training.scaling_law import worth

REPEATS = 1.5  # epochs from which on a text counts as repeated; an estimate of the size is not exact
# Epochs from which on learning by heart is worked against. Up to about four readings teach as much as new text
# (Muennighoff et al. 2023, arXiv:2305.16264), and dropout makes them teach less: by 1 to 6% with four readings.
MANY = 6.0
# Readings times parameters without embeddings, for each token of the text, from which on: a model that is far smaller
# than its text cannot learn it by heart. Measured at 29 and more (docs/recipes.md).
LARGE = 20.0
# Strengths of that, measured by benchmarks/learning/small_corpus.py (docs/recipes.md). Kim et al. 2025
# (arXiv:2509.14786) too find far more decay best where text is repeated.
DROPOUT = 0.1
EMA = 0.1
DECAY = 3.0  # times the weight decay that the run has otherwise


def resolve_small_corpus(
    given: RunConfig, config: RunConfig, epochs: float, *, alone: bool = True
) -> tuple[RunConfig, list[str]]:
    """`config` with the defaults of a repeated text, and a line for people about them.

    Args:
        given: the configuration as the user gave it, before anything was derived.
        epochs: how often the run reads its text.
        alone: whether it is one process; weights that several share out cannot be averaged.
    """
    if epochs < REPEATS:
        return config, []
    line = f"small corpus: {epochs:.2g} readings of the text teach about as much as new text of "
    line += f"{worth(epochs, epochs):.2g} times its length (arXiv:2305.16264)"
    each = count_body(config) * epochs / (config.total_steps * config.tokens_per_step)
    if epochs < MANY or epochs * each < LARGE or config.init is not None:  # measured for new weights only
        return config, [line]
    told = []
    changes = {("training", "dropout"): DROPOUT}
    if alone:
        changes["training", "ema"] = EMA
    if config.optimizer.weight_decay:
        changes["optimizer", "weight_decay"] = float(f"{DECAY * config.optimizer.weight_decay:.2g}")
    for (section, key), value in changes.items():
        if key not in getattr(given, section).model_fields_set:
            config = config.with_keys(section, **{key: value})
            told.append(f"{section}.{key}={value:g}")
    if told:
        line += f"; against learning by heart: {', '.join(told)}"
    return config, [line]
