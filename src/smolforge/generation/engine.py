"""The engine: requests in, steps out. Everything that writes text goes through here.

    engine = Engine.load("RUN")                       # or Engine.of(module, tokenizer) for live weights
    for step in engine.stream(["Once upon a time"], Sampling(seed=1)):
        print(step.text, end="")

A server uses the same in smaller bites: `add` a request, call `step` until it is finished, `cancel` when the
client leaves. One thread owns an engine; nothing here blocks but the arithmetic of one step.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smolforge.errors import BadInput, RunFailed, SmolforgeError
from smolforge.generation.cache import Pool
from smolforge.generation.choose import choose_draft, choose_runner
from smolforge.generation.draft_model import DraftModel
from smolforge.generation.echo import Echo
from smolforge.generation.paired import PairedRunner
from smolforge.generation.prompt import prompt_ids
from smolforge.generation.request import Choice, FinishReason, Request, Step
from smolforge.generation.runner import ModuleRunner, Runner
from smolforge.generation.sampler import Picked, Sampler
from smolforge.generation.sampling import Sampling
from smolforge.generation.scheduler import Piece, Scheduler
from smolforge.generation.speculation import Speculation
from smolforge.generation.text import TextStream

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
        eos_ids: Sequence[int] | None = None,
        context: int | None = None,
        speculate: bool = True,
        draft: DraftModel | None = None,
        decisions: Sequence[str] = (),
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
        pool = Pool(self._paired.new_cache, self._paired.cache_bytes, cache_bytes, keep=max_batch if reuse else 0)
        self.scheduler = Scheduler(pool, max_batch, reuse_prefixes=reuse)
        self.guessed = self.guessed_right = 0
        self._next_id = 0
        self._ready: list[Step] = []  # steps of requests that need no model

    @classmethod
    def of(
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
            runner, decisions = choose_runner(module, quantize, threads=threads)
        chosen = None
        if draft is not None:
            other = draft_tokenizer or tokenizer
            chosen, why = choose_draft(draft, other, runner, tokenizer, name=draft_name, threads=threads)
            decisions = [*decisions, *why]
        return cls(runner, tokenizer, draft=chosen, decisions=decisions, **settings)

    @classmethod
    def load(
        cls, model: str | Path, *, quantize: str = "auto", device: str = "auto", draft: str | Path | None = None,
        **settings: Any,
    ) -> Engine:  # fmt: skip
        """An engine for a run, a checkpoint, a Hugging Face Llama directory or a Hub id.

        Args:
            quantize: fp32, bf16, int8, int4, "auto", or "none" for the precision of the file.
            device: "cpu", "cuda", or "auto" for a GPU where there is one.
            draft: a smaller model of the same tokenizer, named as `model` is, that guesses the next tokens.
            settings: as of `of`.

        Raises:
            CheckpointError: the model or its draft cannot be used.
            BadInput: there is no such precision or device, or the draft has other token ids than the model.
        """
        # The one place where this room asks another of its floor; everything else here takes modules.
        from smolforge.checkpoint.format import read_generation_defaults
        from smolforge.checkpoint.locate import load

        device = _device(device)
        module, tokenizer, directory = load(model, device=device)
        if "eos_ids" not in settings:
            eos = read_generation_defaults(directory).get("eos_token_id")
            settings["eos_ids"] = None if eos is None else eos if isinstance(eos, list) else [eos]
        if draft is not None:
            try:
                settings["draft"], settings["draft_tokenizer"], where = load(draft, device=device)
            except SmolforgeError as error:
                error.field = "draft" if error.field in (None, "model") else f"draft: {error.field}"
                raise
            itself = " (the model itself)" if where.resolve() == directory.resolve() else ""
            settings["draft_name"] = f"{where}{itself}"
        engine = cls.of(module, tokenizer, quantize=quantize, **settings)
        engine.directory = directory
        return engine

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._ready or self.scheduler.waiting or self.scheduler.running)

    def add(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Request:
        """Queue a request.

        Args:
            prompt: text, in which special tokens are only text, or token ids.
            sampling: what is wanted; the defaults if None.

        Raises:
            BadInput: the prompt is empty, holds an id that is no token, or leaves no room in the context; or
                the request needs more cache than there is.
        """
        sampling = sampling or Sampling()
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
        ends = frozenset((*sampling.stop_ids, *(() if sampling.ignore_eos else self.eos_ids)))
        for index in range(sampling.n):
            sampler = Sampler(sampling, ids, seed, index, sorted(ends))
            text = TextStream(self.tokenizer.stream(), sampling.stop)
            echo = Echo(ids, self.tokenizer.stream(), sampling.logprobs) if sampling.echo else None
            choice = Choice(request, index, list(ids), sampler, text, limit, ends, echo=echo)
            if self.speculation is not None:
                self.speculation.begin(choice)
            request.choices.append(choice)
        if sampling.max_tokens == 0 and not (sampling.echo and sampling.logprobs is not None):
            for choice in request.choices:
                self._ready += self._echo(choice, len(ids))
                choice.finish_reason = "length"
                self._ready.append(Step(request.id, choice.index, None, choice.text.flush(), finish_reason="length"))
        else:
            self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request, queued or running: its memory is free at once and no further step of it comes."""
        if request.finished:
            return
        request.cancelled = True
        for choice in request.choices:
            self.scheduler.remove(choice)
        self._ready = [step for step in self._ready if step.request != request.id]

    def step(self) -> list[Step]:
        """Run the model once over all that is running; the steps that came of it, possibly none."""
        steps, self._ready = self._ready, []
        work = self.scheduler.plan()
        if not work:
            return steps
        if self.speculation is not None:
            work = self.speculation.extend(work, len(self.scheduler.running))
        began, row = time.perf_counter(), 0
        logits = _finite(self._paired.forward([piece for _, piece in work]))
        for choice, piece in work:
            choice.computed = piece.start + len(piece.tokens) - piece.guessed
            steps += self._advance(choice, piece, logits[row : row + piece.logits])
            row += piece.logits
        if self.speculation is not None:
            self.speculation.took(work, time.perf_counter() - began)
        return steps

    def stream(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None) -> Iterator[Step]:
        """All steps of some prompts, as they come; `Step.request` is the index of the prompt.

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

    def _advance(self, choice: Choice, piece: Piece, logits: Tensor) -> list[Step]:
        """What a piece of one choice brings: echoed prompt tokens, or the next token."""
        sampling, prompt = choice.request.sampling, choice.request.prompt
        steps: list[Step] = []
        if piece.start < len(prompt):
            described = logits if choice.wants_prompt_logits else None
            steps = self._echo(choice, min(choice.computed, len(prompt)), described)
        if choice.pending or not piece.logits:
            return steps
        if sampling.max_tokens == 0:
            return [*steps, self._finish(choice, "length", None, "")]
        logits = logits[-1 - piece.guessed :]
        right = 0
        for row in range(piece.guessed + 1):
            picked = choice.sampler.pick(logits[row], choice.written)
            steps.append(self._write(choice, picked))
            if row == piece.guessed or picked.token_id != piece.tokens[1 + row]:
                break
            right += 1
            if choice.finish_reason:
                break
            choice.computed += 1  # the guess was right, and its keys and values are there
        if piece.guessed and self.speculation is not None:
            self.speculation.learn(choice, piece.guessed, right)
            self.guessed += piece.guessed
            self.guessed_right += right
        return steps

    def _write(self, choice: Choice, picked: Picked) -> Step:
        """Append a drawn token; the step that shows it, or that ends the choice."""
        choice.tokens.append(picked.token_id)
        choice.sampler.observe(picked.token_id)
        if picked.token_id in choice.ends:
            return self._finish(choice, "stop", picked, "")
        text = choice.text.push(picked.token_id)
        if choice.text.stopped:
            return self._finish(choice, "stop", picked, text)
        if len(choice.tokens) >= choice.limit:
            return self._finish(choice, "length", picked, text)
        return Step(choice.request.id, choice.index, picked.token_id, text, picked.logprob, picked.top_logprobs)

    def _finish(self, choice: Choice, reason: FinishReason, picked: Picked | None, text: str) -> Step:
        text += choice.text.flush()
        if choice.text.stopped:
            reason = "stop"
        choice.finish_reason = reason
        self.scheduler.remove(choice)
        where = choice.request.id, choice.index
        if picked is None:
            return Step(*where, None, text, finish_reason=reason)
        return Step(*where, picked.token_id, text, picked.logprob, picked.top_logprobs, reason)

    def _echo(self, choice: Choice, upto: int, logits: Tensor | None = None) -> list[Step]:
        if choice.echo is None:
            return []
        return [
            Step(choice.request.id, choice.index, p.token_id, text, p.logprob, p.top_logprobs, prompt=True)
            for p, text in choice.echo.report(upto, logits)
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
