"""smolforge: pretrain, resume, sample and serve your own SmolLM2-class language model.

    import smolforge

    run = smolforge.train("pocket", out="runs/pocket", steps=200)
    model = smolforge.load(run.path)
    print(model.generate("Once upon a time", seed=7))
    print(smolforge.evaluate(run.path, "tales").bits_per_byte)

Names are imported when they are first used: `import smolforge` alone costs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolforge.lazy import lazy_attributes

if TYPE_CHECKING:
    from smolforge.api import Model as Model
    from smolforge.api import evaluate as evaluate
    from smolforge.api import load as load
    from smolforge.checkpoint.locate import load_model as load_model
    from smolforge.config import RunConfig as RunConfig
    from smolforge.config import build_config as build_config
    from smolforge.data import Corpus as Corpus
    from smolforge.data import Loader as Loader
    from smolforge.errors import SmolforgeError as SmolforgeError
    from smolforge.generation import Engine as Engine
    from smolforge.generation import SamplingParams as SamplingParams
    from smolforge.run import Run as Run
    from smolforge.tokenizer import Tokenizer as Tokenizer
    from smolforge.training.api import train as train

    __version__: str

_HOMES = {
    "Corpus": "data",
    "Engine": "generation",
    "Loader": "data",
    "Model": "api",
    "Run": "run",
    "RunConfig": "config",
    "SamplingParams": "generation",
    "SmolforgeError": "errors",
    "Tokenizer": "tokenizer",
    "build_config": "config",
    "evaluate": "api",
    "load": "api",
    "load_model": "checkpoint.locate",
    "train": "training.api",
}
__all__ = ["__version__", "generate", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
_lazy = lazy_attributes(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("smolforge")
        except PackageNotFoundError:  # run from its sources, without being installed
            return "0+sources"
    return _lazy(name)


def __dir__() -> list[str]:
    return sorted(__all__)


def generate(model: str | Path, prompt: str, **params: Any) -> str:
    """The continuation of a prompt; `load` keeps a model for several.

    Args:
        model: a run, a checkpoint, a model directory, a .gguf file or a Hub id.
        params: the fields of SamplingParams, such as max_tokens=50 or seed=1.

    Examples:
        >>> import smolforge
        >>> text = smolforge.generate("runs/pocket", "Once upon a time", max_tokens=20, seed=7)
    """
    from smolforge.api import load

    return load(model).generate(prompt, **params)
