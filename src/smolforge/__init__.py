"""smolforge: pretrain, resume, sample and serve your own SmolLM2-class language model.

    import smolforge

    run = smolforge.train("pocket", out="runs/mine")
    engine = smolforge.Engine.from_pretrained("runs/mine")
    for step in engine.stream(["Once upon a time"], smolforge.SamplingParams(seed=1)):
        print(step.text, end="")

Names are imported when they are first used: `import smolforge` alone costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smolforge.lazy import lazy_attributes

if TYPE_CHECKING:
    from smolforge.checkpoint.locate import load_model
    from smolforge.config import RunConfig, build_config
    from smolforge.data import Corpus, Loader
    from smolforge.errors import SmolforgeError
    from smolforge.evaluation import evaluate
    from smolforge.generation import Engine, SamplingParams
    from smolforge.run import Run
    from smolforge.tokenizer import Tokenizer
    from smolforge.training.api import train

_HOMES = {
    "Corpus": "data",
    "Engine": "generation",
    "Loader": "data",
    "Run": "run",
    "RunConfig": "config",
    "SamplingParams": "generation",
    "SmolforgeError": "errors",
    "Tokenizer": "tokenizer",
    "build_config": "config",
    "evaluate": "evaluation",
    "load_model": "checkpoint.locate",
    "train": "training.api",
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
    "build_config",
    "evaluate",
    "load_model",
    "train",
]
__getattr__ = lazy_attributes(__name__, _HOMES)
