"""smolforge: pretrain, resume, sample and serve your own SmolLM2-class language model.

    import smolforge

    run = smolforge.train("pocket", out="runs/mine")
    engine = smolforge.Engine.from_pretrained("runs/mine")
    for step in engine.stream(["Once upon a time"], smolforge.SamplingParams(seed=1)):
        print(step.text, end="")

Names are imported when they are first used: `import smolforge` alone costs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.lazy import lazy_attributes

if TYPE_CHECKING:
    from smolforge.checkpoint.locate import load_model as load_model
    from smolforge.config import RunConfig as RunConfig
    from smolforge.config import build_config as build_config
    from smolforge.data import Corpus as Corpus
    from smolforge.data import Loader as Loader
    from smolforge.errors import SmolforgeError as SmolforgeError
    from smolforge.evaluation import evaluate as evaluate
    from smolforge.generation import Engine as Engine
    from smolforge.generation import SamplingParams as SamplingParams
    from smolforge.model.architecture import CausalLM
    from smolforge.run import Run as Run
    from smolforge.tokenizer import Tokenizer as Tokenizer
    from smolforge.training.api import train as train

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
__all__ = ["generate", "load", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__ = lazy_attributes(__name__, _HOMES)


def load(model: str | Path, **options: Any) -> tuple[CausalLM, Tokenizer, Path]:
    """The model in evaluation mode, its tokenizer and its directory; options as of `load_model`."""
    from smolforge.checkpoint.locate import load_model

    return load_model(model, **options)


def generate(model: str | Path, prompt: str, **params: Any) -> str:
    """The continuation of a prompt; `Engine.from_pretrained` keeps a model loaded for several.

    Args:
        model: a run, a checkpoint, a model directory or a Hub id.
        params: the fields of SamplingParams, such as max_tokens=50 or seed=1.
    """
    from smolforge.generation import Engine

    engine = Engine.from_pretrained(model)
    return engine.generate(prompt, engine.params(**params))
