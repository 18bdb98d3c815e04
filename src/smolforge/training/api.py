"""`smolforge.train`: training from Python."""

from __future__ import annotations

import copy
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolforge.errors import BadInput
from smolforge.logging import show
from smolforge.run import Run
from smolforge.training.auto import choose
from smolforge.training.setup import TrainRequest
from smolforge.training.train import run_training


def train(
    base: str | Path | None = None,
    *,
    out: str | Path | None = None,
    data: str | Sequence[str] | dict[str, float] | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    init: str | None = None,
    fresh: bool = False,
    accept_changed_data: bool = False,
    time_limit: float | None = None,
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Run:
    """Start a run or continue one, and train it to its end or the time limit; the run.

    Args:
        base: preset or YAML file; unless given that of the run, for a new run one that suits `data`, or `pocket`.
        out: directory of the run; runs/NAME after `base` or the first source unless given.
        data: source or sources of text, or {source: weight}.
        steps: length of the run in steps.
        tokens: length of the run in tokens.
        epochs: length of the run in passes through the data, of text by an estimate.
        minutes: about so long; without a `base` the size of the model follows from it and from the text.
        init: start from the weights of a model directory or Hub id.
        fresh: start over; an existing run is moved aside.
        accept_changed_data: continue a run although its data changed; the step is recorded.
        time_limit: seconds after which to save and return.
        config: more settings by section, such as {"optimizer": {"lr": 1e-3}}.
        quiet: leave Python's logging as it is, instead of showing messages and progress on stderr.

    Raises:
        SmolforgeError: bad input (nothing was changed), or the run failed (what could be saved was saved).
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM arrived; the state was saved.

    Examples:
        >>> import smolforge
        >>> run = smolforge.train("pocket", out="runs/pocket", steps=2, quiet=True)
    """
    lengths = {"steps": steps, "tokens": tokens, "epochs": epochs, "minutes": minutes}
    layers = _layers(config, lengths, data=data, init=init)
    if not quiet:
        show()
    request = TrainRequest(
        base=None if base is None else str(base),
        layers=layers,
        out=None if out is None else Path(out),
        fresh=fresh,
        accept_changed_data=accept_changed_data,
        time_limit=time_limit,
    )
    run, shutdown = run_training(choose(request, minutes))
    if shutdown.signal is signal.SIGINT:
        raise KeyboardInterrupt
    if shutdown.signal is not None:
        raise SystemExit(shutdown.exit_code)
    return run


def _layers(
    config: Mapping[str, Any] | None,
    lengths: Mapping[str, float | None],
    *,
    data: str | Sequence[str] | dict[str, float] | None,
    init: str | None,
) -> dict[str, Any]:
    """The settings by section: those of `config`, and the arguments that have a key."""
    layers: dict[str, Any] = copy.deepcopy(dict(config or {}))
    if sum(length is not None for length in lengths.values()) > 1:
        raise BadInput(f"give one of {', '.join(lengths)}", field="steps")
    for name, length in lengths.items():
        if length is not None and name != "minutes":
            layers.setdefault("training", {})[name] = length
    if data is not None:
        sources = [data] if isinstance(data, str) else data
        weights = sources if isinstance(sources, dict) else dict.fromkeys(sources, 1.0)
        layers.setdefault("data", {})["sources"] = dict(weights)
    if init is not None:
        layers["init"] = init
    return layers
