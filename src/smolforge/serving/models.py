"""What is served: a model directory as it is, or a run whose newest whole checkpoint is followed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from smolforge import hub
from smolforge.checkpoint import commit, locate
from smolforge.errors import CheckpointError
from smolforge.run import Run

if TYPE_CHECKING:
    from smolforge.generation.engine import Engine


@dataclasses.dataclass(eq=False)
class LoadedModel:
    """An engine and where its weights came from. Only the worker's thread steps it.

    Attributes:
        step: the checkpoint's training step, or None for a model that is no checkpoint.
        created: seconds since the epoch of the weights' file, for the API.
    """

    engine: Engine
    directory: Path
    step: int | None
    created: int


class ModelSource:
    """What the user named, and what can be loaded from it.

    Attributes:
        name: id in the API.
        run: the run it belongs to, if any: its checkpoints feed the time-lapse, its logs the training tab.
        follows: whether newer checkpoints replace the one that is served (a run, not one checkpoint of it).
    """

    def __init__(self, model: str, name: str | None = None) -> None:
        self.model = model
        path = Path(model).expanduser()
        self.run: Run | None = None
        self.follows = False
        if not path.exists():
            if not hub.is_model_id(model):
                locate.resolve_model(model)  # says what is wrong
            self.name = name or model
            return
        path = path.resolve()
        if commit.step_of(path) is not None and Run(path.parent.parent).exists:
            self.run = Run(path.parent.parent)
        elif not (path / "config.json").is_file() and (Run(path).exists or Run(path).checkpoints_path.is_dir()):
            self.run, self.follows = Run(path), True
        self.name = name or (f"{self.run.path.name}" if self.follows and self.run else path.name)

    @property
    def waiting(self) -> bool:
        """Whether this is a run that has no checkpoint yet."""
        return self.follows and not self.steps()

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first; none for a model that belongs to no run."""
        return commit.steps(self.run.checkpoints_path) if self.run else []

    def checkpoint(self, step: int) -> Path:
        """Directory of one of `steps()`.

        Raises:
            CheckpointError: there is none of this step.
        """
        if self.run is None or step not in self.steps():
            raise CheckpointError(f"there is no checkpoint of step {step}", field="steps")
        return self.run.checkpoints_path / commit.step_name(step)

    def newer_than(self, step: int | None) -> bool:
        """Whether the run has a later checkpoint than `step`; looks only at names, so it is cheap."""
        steps = self.steps() if self.follows else []
        return bool(steps) and (step is None or steps[-1] > step)

    def open(
        self, *, quantize: str = "auto", max_batch: int = 16, step: int | None = None, draft: str | None = None
    ) -> LoadedModel:
        """Load the newest whole checkpoint, or that of `step`, with a draft model beside it where one is named.

        Raises:
            CheckpointError: nothing usable is there.
            BadInput: the draft has other token ids; its `field` is "draft".
        """
        from smolforge.generation.engine import Engine

        target = self.model if step is None else self.checkpoint(step)
        engine = Engine.from_pretrained(target, quantize=quantize, max_batch=max_batch, draft=draft)
        directory = engine.directory
        assert directory is not None
        weights = directory / "model.safetensors"
        created = int(weights.stat().st_mtime if weights.is_file() else time.time())
        return LoadedModel(engine, directory, commit.step_of(directory.resolve()), created)
