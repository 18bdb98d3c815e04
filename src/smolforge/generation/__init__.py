"""Text from a model: continuous batching, fast runners, exact sampling, speculative decoding.

A request is a prompt with its SamplingParams; it becomes `n` sequences. In each step the scheduler chooses which
sequences run and cuts their tokens into chunks; a runner runs all chunks through the model at once, extends their
caches and returns logits; a sampler per sequence draws the next token; a detokenizer turns it into text; and a
StepOutput goes to the caller. Nothing in a text depends on what else runs.

    prompt → Engine.add → Scheduler.schedule → Runner.forward → Sampler.sample → Detokenizer.push → StepOutput

In the order to read them:

    engine.py             Engine: add, step, stream, cancel, generate
    sequence.py           Request, Sequence, ScheduledChunk, StepOutput: the data of a step; Detokenizer: its text
    scheduler.py          continuous batching: which sequences run in the next step
    kv_cache.py           memory of keys and values, and the pool that allocates it
    quantize.py           four bits per weight: the search for scales, and rounding by what layers see
    runners/__init__.py   Runner, and the choice of one and of a precision; names the files next to it
    sampling_params.py    SamplingParams: the settings of a request
    grammar.py            constrained decoding: JSON of a schema, and other grammars
    sampler.py            penalties, filters, and the draw of a token
    speculative.py        n-gram and model drafts, and when they pay
    draft_model.py        a small model that drafts, and its cache
    conversation.py       Conversation: turns and answers of a model with a chat template
    bench.py              smolforge bench generate
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smolforge.lazy import lazy_attributes

if TYPE_CHECKING:
    from smolforge.generation.conversation import Conversation as Conversation
    from smolforge.generation.engine import Engine as Engine
    from smolforge.generation.sampling_params import SamplingParams as SamplingParams
    from smolforge.generation.sequence import Request as Request
    from smolforge.generation.sequence import StepOutput as StepOutput

# Of an answer, where neither the user nor the model says: right rather than surprising, as SmolLM2's authors advise,
# and with Ollama's penalty. Without it a small model often ends in a loop.
CHAT_SAMPLING = {"max_tokens": 1024, "temperature": 0.2, "repetition_penalty": 1.1}

_HOMES = {
    "Conversation": "conversation",
    "Engine": "engine",
    "Request": "sequence",
    "SamplingParams": "sampling_params",
    "StepOutput": "sequence",
}
__getattr__ = lazy_attributes(__name__, _HOMES)
