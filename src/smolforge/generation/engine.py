"""The engine: requests in, steps out. Everything that writes text goes through here.

    engine = Engine.from_pretrained("RUN")  # or Engine.from_model(module, tokenizer) for live weights
    for step in engine.stream(["Once upon a time"], SamplingParams(seed=1)):
        print(step.text, end="")

A server uses the same in smaller bites: `add` a request, call `step` until it is finished, `cancel` when the
client leaves. One thread owns an engine; nothing here blocks but the arithmetic of one step.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smolforge.errors import BadInput, RunFailed, SmolforgeError
from smolforge.generation.detokenizer import TextStream
from smolforge.generation.draft_model import DraftModel, PairedRunner, select_draft
from smolforge.generation.echo import Echo
from smolforge.generation.kv_cache import CachePool
from smolforge.generation.prompt import Prompt, prompt_ids
from smolforge.generation.runners import Runner, select_runner
from smolforge.generation.runners.module import ModuleRunner
from smolforge.generation.sampler import SampledToken, Sampler
from smolforge.generation.sampling_params import SamplingParams
from smolforge.generation.scheduler import Scheduler
from smolforge.generation.sequence import FinishReason, Request, ScheduledChunk, Sequence, StepOutput
from smolforge.generation.speculative import Speculation

if TYPE_CHECKING:
    from smolforge.tokenizer import Tokenizer

DEFAULT_CACHE = 2 << 30


class Engine:
    """Continues prompts, many at once.

    Args:
        runner: what computes logits.
        tokenizer: of the model.
        max_batch: most continuations at once; others wait.
        cache_bytes: most memory of keys and values.
        eos_ids: tokens that end a text; the tokenizer's own unless given.
        context: most positions; the model's own unless given.
        speculate: read guesses of the next tokens along with the last one, where the text stays bitwise the same.
        draft: a small model that guesses too, where the text itself brings no guess or a worse one.

    Attributes:
        decisions: what was chosen and why, one sentence each.
        directory: where the model was loaded from, or None.
        guessed: tokens that were guessed ahead so far, and of them
        guessed_right: those that were drawn.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        cache_bytes: int = DEFAULT_CACHE,
        eos_ids: Iterable[int] | None = None,
        context: int | None = None,
        speculate: bool = True,
        draft: DraftModel | None = None,
        decisions: Iterable[str] = (),
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.vocab_size = runner.config.vocab_size
        self.context = min(context or runner.config.max_position_embeddings, runner.config.max_position_embeddings)
        self.eos_ids = tuple(eos_ids) if eos_ids is not None else (tokenizer.eos_id,)
        self.decisions = list(decisions)
        self.directory: Path | None = None
        reuse = runner.batch_invariant
        self.speculates = speculate and runner.batch_invariant
        if draft is not None and not self.speculates:
            draft = None
            self.decisions.append("draft: the draft model is not used, since this engine does not speculate")
        self.speculation = Speculation(draft) if self.speculates else None
        self._paired = PairedRunner(runner, draft.runner) if draft is not None else runner
        pool = CachePool(self._paired.new_cache, self._paired.cache_bytes, cache_bytes, keep=max_batch if reuse else 0)
        self.scheduler = Scheduler(pool, max_batch, reuse_prefixes=reuse)
        self.guessed = self.guessed_right = 0
        self._next_id = 0
        self._ready: list[StepOutput] = []  # steps of requests that need no model

    @classmethod
    def from_model(
        cls,
        module: Any,
        tokenizer: Tokenizer,
        *,
        quantize: str | None = None,
        threads: int | None = None,
        draft: Any = None,
        draft_tokenizer: Tokenizer | None = None,
        draft_name: str = "the draft model",
        **settings: Any,
    ) -> Engine:
        """An engine over a module.

        Args:
            quantize: None runs the live weights: what training changes, the next step sees. A precision (or
                "auto", or "none" for that of the weights) packs the weights as they are now for the fastest
                runner of this machine.
            threads: of the packed runners.
            draft: the module of a draft model. Live weights do without it, as a line of `decisions` says.
            draft_tokenizer: of the draft; the same one unless given.
            draft_name: of the draft, in `decisions`.
            settings: as of the class.

        Raises:
            BadInput: there is no such precision, or the draft has other token ids than the model.
        """
        if quantize is None:
            runner, decisions = ModuleRunner(module), []
        else:
            runner, decisions = select_runner(module, quantize, threads=threads)
        chosen = None
        if draft is not None:
            other = draft_tokenizer or tokenizer
            chosen, why = select_draft(draft, other, runner, tokenizer, name=draft_name, threads=threads)
            decisions = [*decisions, *why]
        return cls(runner, tokenizer, draft=chosen, decisions=decisions, **settings)

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, quantize: str = "auto", device: str = "auto", draft: str | Path | None = None,
        **settings: Any,
    ) -> Engine:  # fmt: skip
        """An engine for a run, a checkpoint, a Hugging Face Llama directory or a Hub id.

        Args:
            quantize: fp32, bf16, int8, int4, "auto", or "none" for the precision of the file.
            device: "cpu", "cuda", or "auto" for a GPU where there is one.
            draft: a smaller model of the same tokenizer, named as `model` is, that guesses the next tokens.
            settings: as of `from_model`.

        Raises:
            CheckpointError: the model or its draft cannot be used.
            BadInput: there is no such precision or device, or the draft has other token ids than the model.
        """
        # The one place where this room asks another of its floor; everything else here takes modules.
        from smolforge.checkpoint.format import read_generation_defaults
        from smolforge.checkpoint.locate import load_model

        device = _device(device)
        module, tokenizer, directory = load_model(model, device=device)
        if "eos_ids" not in settings:
            eos = read_generation_defaults(directory).get("eos_token_id")
            settings["eos_ids"] = None if eos is None else eos if isinstance(eos, list) else [eos]
        if draft is not None:
            try:
                settings["draft"], settings["draft_tokenizer"], where = load_model(draft, device=device)
            except SmolforgeError as error:
                error.field = "draft" if error.field in (None, "model") else f"draft: {error.field}"
                raise
            itself = " (the model itself)" if where.resolve() == directory.resolve() else ""
            settings["draft_name"] = f"{where}{itself}"
        engine = cls.from_model(module, tokenizer, quantize=quantize, **settings)
        engine.directory = directory
        return engine

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._ready or self.scheduler.waiting or self.scheduler.running)

    def add(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Request:
        """Queue a request.

        Args:
            prompt: text, in which special tokens are only text, or token ids.
            sampling: what is wanted; the defaults if None.

        Raises:
            BadInput: the prompt is empty, holds an id that is no token, or leaves no room in the context; or
                the request needs more cache than there is.
        """
        sampling = sampling or SamplingParams()
        ids = prompt_ids(prompt, self.tokenizer, self.vocab_size)
        sampling.check_vocabulary(self.vocab_size)
        room = self.context if sampling.max_tokens == 0 else self.context - 1
        if len(ids) > room:
            raise BadInput(
                f"the prompt is {len(ids)} tokens long, and the context holds {self.context} with what is written",
                field="prompt",
                hint=f"Shorten it to at most {room} tokens.",
            )
        limit = min(len(ids) + sampling.max_tokens, self.context)
        pool = self.scheduler.pool
        if pool.bytes_for(limit) > pool.budget:
            raise BadInput(
                f"{limit} positions need {pool.bytes_for(limit):,} bytes of cache, and there are {pool.budget:,}",
                field="max_tokens",
                hint="Ask for fewer tokens or give the engine more cache_bytes.",
            )
        seed = secrets.randbits(53) if sampling.seed is None else sampling.seed
        request = Request(self._next_id, ids, sampling, seed)
        self._next_id += 1
        stop_token_ids = frozenset((*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.eos_ids)))
        for index in range(sampling.n):
            sampler = Sampler(sampling, ids, seed, index, sorted(stop_token_ids))
            text = TextStream(self.tokenizer.stream(), sampling.stop)
            echo = Echo(ids, self.tokenizer.stream(), sampling.logprobs) if sampling.echo else None
            sequence = Sequence(request, index, list(ids), sampler, text, limit, stop_token_ids, echo=echo)
            if self.speculation is not None:
                self.speculation.begin(sequence)
            request.sequences.append(sequence)
        if sampling.max_tokens == 0 and not (sampling.echo and sampling.logprobs is not None):
            for sequence in request.sequences:
                self._ready += self._echo(sequence, len(ids))
                sequence.finish_reason = "length"
                self._ready.append(
                    StepOutput(request.id, sequence.index, None, sequence.text.flush(), finish_reason="length")
                )
        else:
            self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request, queued or running: its memory is free at once and no further step of it comes."""
        if request.finished:
            return
        request.cancelled = True
        for sequence in request.sequences:
            self.scheduler.remove(sequence)
        self._ready = [step for step in self._ready if step.request != request.id]

    def step(self) -> list[StepOutput]:
        """Run the model once over all that is running; the steps that came of it, possibly none."""
        steps, self._ready = self._ready, []
        work = self.scheduler.plan()
        if not work:
            return steps
        if self.speculation is not None:
            work = self.speculation.extend(work, len(self.scheduler.running))
        began, row = time.perf_counter(), 0
        logits = _finite(self._paired.forward([chunk for _, chunk in work]))
        for sequence, chunk in work:
            sequence.computed = chunk.start + len(chunk.tokens) - chunk.guessed
            steps += self._advance(sequence, chunk, logits[row : row + chunk.logits])
            row += chunk.logits
        if self.speculation is not None:
            self.speculation.took(work, time.perf_counter() - began)
        return steps

    def stream(self, prompts: Iterable[Prompt], sampling: SamplingParams | None = None) -> Iterator[StepOutput]:
        """All steps of some prompts, as they come; `StepOutput.request` is the index of the prompt.

        For an engine that nobody else uses meanwhile. Closing the iterator cancels what is left.

        Raises:
            BadInput: as of `add`; nothing has run then.
        """
        requests: list[Request] = []
        try:
            requests.extend(self.add(prompt, sampling) for prompt in prompts)
            index = {request.id: i for i, request in enumerate(requests)}
            while not all(request.finished for request in requests) or self._ready:
                for step in self.step():
                    if step.request in index:
                        yield dataclasses.replace(step, request=index[step.request])
        finally:
            for request in requests:
                self.cancel(request)

    def memory(self) -> dict[str, int]:
        """Bytes: of the runners' own weights, of caches reserved by what runs, and of caches kept for reuse.

        A draft model's are part of all of them; "draft_weights" are those of "weights" that are its own.
        """
        pool = self.scheduler.pool
        return {
            "weights": self._paired.weight_bytes,
            "draft_weights": self._paired.weight_bytes - self.runner.weight_bytes,
            "cache_reserved": pool.reserved,
            "cache_kept": pool.kept,
            "cache_budget": pool.budget,
        }

    def _advance(self, sequence: Sequence, chunk: ScheduledChunk, logits: Tensor) -> list[StepOutput]:
        """What a chunk of one sequence brings: echoed prompt tokens, or the next token."""
        sampling, prompt = sequence.request.params, sequence.request.prompt
        steps: list[StepOutput] = []
        if chunk.start < len(prompt):
            described = logits if sequence.wants_prompt_logits else None
            steps = self._echo(sequence, min(sequence.computed, len(prompt)), described)
        if sequence.pending or not chunk.logits:
            return steps
        if sampling.max_tokens == 0:
            return [*steps, self._finish(sequence, "length", None, "")]
        logits = logits[-1 - chunk.guessed :]
        right = 0
        for row in range(chunk.guessed + 1):
            picked = sequence.sampler.pick(logits[row], sequence.written)
            steps.append(self._write(sequence, picked))
            if row == chunk.guessed or picked.token_id != chunk.tokens[1 + row]:
                break
            right += 1
            if sequence.finish_reason:
                break
            sequence.computed += 1  # the guess was right, and its keys and values are there
        if chunk.guessed and self.speculation is not None:
            self.speculation.learn(sequence, chunk.guessed, right)
            self.guessed += chunk.guessed
            self.guessed_right += right
        return steps

    def _write(self, sequence: Sequence, picked: SampledToken) -> StepOutput:
        """Append a drawn token; the step that shows it, or that ends the sequence."""
        sequence.tokens.append(picked.token_id)
        sequence.sampler.observe(picked.token_id)
        if picked.token_id in sequence.stop_token_ids:
            return self._finish(sequence, "stop", picked, "")
        text = sequence.text.push(picked.token_id)
        if sequence.text.stopped:
            return self._finish(sequence, "stop", picked, text)
        if len(sequence.tokens) >= sequence.limit:
            return self._finish(sequence, "length", picked, text)
        return StepOutput(
            sequence.request.id, sequence.index, picked.token_id, text, picked.logprob, picked.top_logprobs
        )

    def _finish(self, sequence: Sequence, reason: FinishReason, picked: SampledToken | None, text: str) -> StepOutput:
        text += sequence.text.flush()
        if sequence.text.stopped:
            reason = "stop"
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)
        where = sequence.request.id, sequence.index
        if picked is None:
            return StepOutput(*where, None, text, finish_reason=reason)
        return StepOutput(*where, picked.token_id, text, picked.logprob, picked.top_logprobs, reason)

    def _echo(self, sequence: Sequence, upto: int, logits: Tensor | None = None) -> list[StepOutput]:
        if sequence.echo is None:
            return []
        return [
            StepOutput(sequence.request.id, sequence.index, p.token_id, text, p.logprob, p.top_logprobs, prompt=True)
            for p, text in sequence.echo.report(upto, logits)
        ]


def _finite(logits: Tensor) -> Tensor:
    if len(logits) and torch.isnan(logits.max()):
        raise RunFailed("the model's logits are not numbers", hint="Its weights are damaged, or training diverged.")
    return logits


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.partition(":")[0] not in ("cpu", "cuda"):
        raise BadInput(f"{wanted!r} is no device here", field="device", hint="Give cpu, cuda or auto.")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput("there is no CUDA device, or torch was installed without CUDA", field="device")
    return wanted
