"""Ask llama.cpp for text of an exported GGUF file and compare it with what smolforge writes from the same file.

A file can load everywhere and still answer badly: without its chat template, with another end token, or with rows in
another order. llama.cpp rounds activations otherwise than the native step, so its greedy text may differ where two
tokens are nearly as likely. Such a place is told from an error by how much less likely its token is.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolforge.config import THREE_PROMPTS
from smolforge.errors import BadInput, RunFailed
from smolforge.generation import Engine, SamplingParams, StepOutput

QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.", "How do I boil an egg?")
CLOSE = 2.5  # nats: a right q8_0 file differed by 1.6, where llama.cpp rounds activations to 8 bits
_CONTEXT = 512


@dataclass(frozen=True)
class Comparison:
    """The greedy texts of one prompt."""

    prompt: str
    ours: str
    theirs: str
    # By how many nats llama.cpp's first other token is less likely than ours: 0 where the texts are equal, and infinite
    # where it is none of the 20 likeliest.
    gap: float


def compare_with_llama_cpp(path: Path, *, prompts: tuple[str, ...] = (), tokens: int = 48) -> list[Comparison]:
    """Greedy answers of a GGUF file, or continuations where it has no chat template, by smolforge and by llama.cpp.

    Args:
        prompts: questions or beginnings of texts; three unless given.
        tokens: maximum number of each answer.

    Raises:
        BadInput: the package llama_cpp is not installed.
    """
    llama_cpp = require_llama_cpp()
    engine = Engine.from_pretrained(path, quantize="none", device="cpu")
    chats = engine.tokenizer.chat_template is not None
    # Keys and values in fp32 (type 0), as the native step has them for weights of a file.
    llama = llama_cpp.Llama(str(path), n_ctx=_CONTEXT, n_threads=os.cpu_count(), verbose=False, type_k=0, type_v=0)
    found = []
    for prompt in prompts or (QUESTIONS if chats else THREE_PROMPTS):
        messages = [{"role": "user", "content": prompt}]
        if chats:
            answer = llama.create_chat_completion(messages, temperature=0.0, max_tokens=tokens)
            theirs = answer["choices"][0]["message"]["content"] or ""
        else:
            theirs = llama.create_completion(prompt, temperature=0.0, max_tokens=tokens)["choices"][0]["text"]
        asked = engine.tokenizer.encode_chat(messages) if chats else prompt
        outputs = list(engine.stream([asked], SamplingParams(temperature=0, max_tokens=tokens, logprobs=20)))
        ours = "".join(output.text for output in outputs)
        found.append(Comparison(prompt, ours, theirs, _gap(engine, outputs, ours, theirs)))
    return found


def require_llama_cpp() -> Any:
    """The module llama_cpp; BadInput where it is not installed."""
    try:
        return importlib.import_module("llama_cpp")
    except ImportError as error:
        problem = f"comparing with llama.cpp needs the package llama-cpp-python: {error}"
        hint = "pip install llama-cpp-python compiles it, which takes minutes."
        raise BadInput(problem, field="--check", hint=hint) from None


def summarize(found: list[Comparison]) -> str:
    """What the comparison showed, in one sentence.

    Raises:
        RunFailed: a text of llama.cpp cannot be explained by rounding.
    """
    worst = max(found, key=lambda each: each.gap)
    if worst.gap > CLOSE:
        problem = f"llama.cpp answers {worst.prompt!r} with {worst.theirs[:80]!r}, smolforge with {worst.ours[:80]!r}"
        hint = "The file stays where it is. Do not publish it; please report this."
        raise RunFailed(problem, field="--check", hint=hint)
    equal = sum(each.ours == each.theirs for each in found)
    words = f"llama.cpp writes the same greedy text for {equal} of {len(found)} prompts"
    if equal == len(found):
        return words
    return f"{words}; where another differs, its token is {worst.gap:.2f} nats less likely at most"


def _gap(engine: Engine, outputs: list[StepOutput], ours: str, theirs: str) -> float:
    if ours == theirs:
        return 0.0
    shorter = min(len(ours), len(theirs))
    common = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    step = [output for output in outputs if output.top_logprobs and output.text_offset <= common][-1]
    rest = theirs[step.text_offset :]

    def continues() -> Iterator[float]:
        for token, logprob in step.top_logprobs:
            text = engine.tokenizer.decode([token])
            if token != step.token_id and (rest.startswith(text) if text else not rest and token in engine.eos_ids):
                yield logprob

    return step.top_logprobs[0][1] - max(continues(), default=-math.inf)
