"""smolforge: pretrain, resume, sample and serve your own SmolLM2-class language model.

    import smolforge

    run, code = smolforge.train(smolforge.TrainRequest("pocket", out="runs/mine"))
    engine = smolforge.Engine.from_pretrained("runs/mine")
    for step in engine.stream(["Once upon a time"], smolforge.SamplingParams(seed=1)):
        print(step.text, end="")

Names are imported when they are first used: `import smolforge` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolforge.checkpoint.locate import load_model
    from smolforge.config import RunConfig, build_config
    from smolforge.data import Corpus, Loader
    from smolforge.errors import SmolforgeError
    from smolforge.evaluation import evaluate
    from smolforge.generation import Engine, SamplingParams
    from smolforge.run import Run
    from smolforge.tokenizer import Tokenizer
    from smolforge.training.setup import TrainRequest
    from smolforge.training.train import train

_HOMES = {
    "Corpus": ("data", "Corpus"),
    "Engine": ("generation", "Engine"),
    "Loader": ("data", "Loader"),
    "TrainRequest": ("training.setup", "TrainRequest"),
    "Run": ("run", "Run"),
    "RunConfig": ("config", "RunConfig"),
    "SamplingParams": ("generation", "SamplingParams"),
    "SmolforgeError": ("errors", "SmolforgeError"),
    "Tokenizer": ("tokenizer", "Tokenizer"),
    "build_config": ("config", "build_config"),
    "evaluate": ("evaluation", "evaluate"),
    "load_model": ("checkpoint.locate", "load_model"),
    "train": ("training.train", "train"),
}
__all__ = [
    "Corpus",
    "Engine",
    "Loader",
    "Run",
    "RunConfig",
    "SamplingParams",
    "SmolforgeError",
    "Tokenizer",
    "TrainRequest",
    "build_config",
    "evaluate",
    "load_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smolforge' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"smolforge.{module}"), attribute)
