"""Text from a model: the engine, what a request asks for, and the fast ways of running one step.

    prompt → Engine.add → Scheduler.plan → Runner.forward → Sampler.pick → TextStream.push → StepOutput

`engine` holds the loop; `scheduler` decides who runs, `cache` owns the memory, a runner (`runner`, `stock`,
`native`, on a GPU `static`; picked by `choose`) does the arithmetic, `sampler` and `processors` draw, `text` shows.
`speculation` lets guesses run along, of `draft` (the text itself) or `draft_model`. Each knows only its own noun.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smolforge.lazy import lazy_attributes

if TYPE_CHECKING:
    from smolforge.generation.engine import Engine as Engine
    from smolforge.generation.sampling_params import SamplingParams as SamplingParams
    from smolforge.generation.sequence import Request as Request
    from smolforge.generation.sequence import StepOutput as StepOutput

_HOMES = {"Engine": "engine", "Request": "sequence", "StepOutput": "sequence", "SamplingParams": "sampling_params"}
__getattr__ = lazy_attributes(__name__, _HOMES)
