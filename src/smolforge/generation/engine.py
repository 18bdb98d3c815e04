"""The engine: requests in, step outputs out. Everything that writes text uses it.

    engine = Engine.from_pretrained("RUN")  # or Engine.from_model(module, tokenizer) for the live weights of a module
    print(engine.generate("Once upon a time", SamplingParams(seed=1)))
    for output in engine.stream(["Once upon a time"]):
        print(output.text, end="")

A server uses smaller steps: `add` a request, call `step` until it is finished, `cancel` it when the client leaves. One
thread owns an engine; nothing here blocks but the arithmetic of one step.
"""

from __future__ import annotations

import functools
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from smolforge.devices import choose_device
from smolforge.errors import BadInput, CheckpointError, RunFailed, SmolforgeError
from smolforge.generation.draft_model import DraftModel, PairedRunner
from smolforge.generation.grammar import GrammarCompiler
from smolforge.generation.kv_cache import CachePool
from smolforge.generation.runners import DeviceSampler, Runner, select_runner
from smolforge.generation.runners.module import ModuleRunner
from smolforge.generation.sampler import SampledToken
from smolforge.generation.sampling_params import SamplingParams
from smolforge.generation.scheduler import Scheduler
from smolforge.generation.sequence import Prompt, Request, ScheduledChunk, Sequence, StepOutput, Work, prompt_ids
from smolforge.generation.speculative import Speculation, select_draft
from smolforge.tokenizer import Tokenizer

DEFAULT_CACHE = 2 << 30


class Engine:
    """Continues prompts, many at once.

    Args:
        max_batch: maximum number of sequences that run at once; others wait.
        cache_bytes: maximum memory of keys and values; 2 GiB unless given, on a GPU half of what is free.
        eos_ids: tokens that end a text; the tokenizer's own unless given.
        defaults: fields of SamplingParams for a request that does not give them (`params`).
        speculate: run drafts of the next tokens along with the last one, where the text stays bitwise the same.
        draft: a small model that drafts too, where the text itself yields no draft or a worse one.
        decisions: sentences to begin the attribute of this name with: what was chosen and why.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        cache_bytes: int | None = None,
        eos_ids: Iterable[int] | None = None,
        defaults: Mapping[str, Any] | None = None,
        speculate: bool = True,
        draft: DraftModel | None = None,
        decisions: Iterable[str] = (),
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.vocab_size = runner.config.vocab_size
        self.context = runner.config.max_position_embeddings  # maximum number of positions
        self.eos_ids = tuple(eos_ids) if eos_ids is not None else (tokenizer.eos_id,)
        self.defaults = dict(defaults or {})
        self.decisions = list(decisions)
        self.directory: Path | None = None  # where the model was loaded from
        reuse = runner.batch_invariant
        if draft is not None and not (speculate and reuse):
            draft = None
            self.decisions.append("draft: the draft model is not used, since this engine does not speculate")
        self.speculation = Speculation(draft) if speculate and reuse else None
        self._paired = PairedRunner(runner, draft.runner) if draft is not None else runner
        self._device_sampler = runner if isinstance(runner, DeviceSampler) else None
        budget = cache_bytes or (self._device_sampler.default_cache_bytes() if self._device_sampler else DEFAULT_CACHE)
        if self._device_sampler:
            self._device_sampler.most_caches = min(max_batch, budget // runner.cache_bytes(self.context))
        pool = CachePool(self._paired.new_cache, self._paired.cache_bytes, budget, keep=max_batch if reuse else 0)
        self.scheduler = Scheduler(pool, max_batch, reuse_prefixes=reuse)
        self._next_id = 0
        self._ready: list[StepOutput] = []  # outputs of requests that need no model

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
            quantize: None runs the live weights: a change by training is used from the next step on. A precision (or
                "auto", or "none" for that of the weights) packs the weights as they are now for the fastest
                runner of this machine.
            threads: of the packed runners.
            draft: the module of a draft model. It is not used with live weights, as a line of `decisions` says.
            draft_tokenizer: the same one unless given.
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
        adapter: str | Path | None = None, **settings: Any,
    ) -> Engine:  # fmt: skip
        """An engine for a run, a checkpoint, a Hugging Face Llama directory or a Hub id.

        A text ends with the end tokens of the tokenizer, of generation_config.json and of config.json; what
        generation_config.json says of sampling becomes `defaults`.

        Args:
            quantize: fp32, bf16, int8, int4, "auto", or "none" for the precision of the file.
            device: as of `devices.choose_device`.
            draft: a smaller model of the same tokenizer, named as `model` is, that drafts the next tokens.
            adapter: a LoRA run or an adapter that peft wrote, which is merged into the model.
            settings: as of `from_model`.

        Raises:
            CheckpointError: the model or its draft cannot be used.
            BadInput: there is no such precision or device, or the draft has other token ids than the model.
        """
        # The one place where this package imports another of its layer; everything else here takes modules.
        from smolforge.checkpoint.format import read_end_ids, read_generation_defaults
        from smolforge.checkpoint.locate import load_model

        place = choose_device(device)
        module, tokenizer, directory = load_model(model, device=place, adapter=adapter)
        known = range(module.config.vocab_size)
        ends = [i for i in (tokenizer.eos_id, *read_end_ids(directory)) if i in known]
        defaults = _sampling_defaults(read_generation_defaults(directory), directory)
        settings = {"eos_ids": tuple(dict.fromkeys(ends)), "defaults": defaults, **settings}
        if draft is not None:
            try:
                settings["draft"], settings["draft_tokenizer"], where = load_model(draft, device=place)
            except SmolforgeError as error:
                error.field = "draft" if error.field in (None, "model") else f"draft: {error.field}"
                raise
            itself = " (the model itself)" if where.resolve() == directory.resolve() else ""
            settings["draft_name"] = f"{where}{itself}"
        engine = cls.from_model(module, tokenizer, quantize=quantize, **settings)
        engine.directory = directory
        if adapter is not None:
            engine.decisions.append(f"adapter: {adapter}, merged")
        if defaults:
            told = ", ".join(f"{name} {value}" for name, value in defaults.items())
            engine.decisions.append(f"sampling: {told} (generation_config.json), unless given")
        return engine

    @functools.cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles what `SamplingParams.grammar` takes, for example the JSON of a schema."""
        return GrammarCompiler(self.tokenizer, self.vocab_size, self.eos_ids)

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._ready or self.scheduler.waiting or self.scheduler.running)

    def params(self, **given: Any) -> SamplingParams:
        """The settings of a request: what is given, the model's own `defaults` and those of SamplingParams."""
        return SamplingParams(**{**self.defaults, **given})

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """The text that continues a prompt (the first of `params.n`); raises as `add` does."""
        return "".join(output.text for output in self.stream([prompt], params) if output.index == 0)

    def stream(self, prompts: Iterable[Prompt], params: SamplingParams | None = None) -> Iterator[StepOutput]:
        """All outputs for some prompts, as they come; `StepOutput.request` is the index of the prompt.

        For an engine that nothing else uses meanwhile. Closing the iterator cancels what is left.

        Raises:
            BadInput: as of `add`; nothing has run then.
        """
        if isinstance(prompts, str):
            raise BadInput("must be a list of prompts, not one text", field="prompts", hint="Write [text].")
        requests: list[Request] = []
        try:
            requests.extend(self.add(prompt, params) for prompt in prompts)
            index = {request.id: i for i, request in enumerate(requests)}
            while not all(request.finished for request in requests) or self._ready:
                for output in self.step():
                    if output.request in index:
                        yield output._replace(request=index[output.request])
        finally:
            for request in requests:
                self.cancel(request)

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Queue a request.

        Args:
            prompt: text, in which special tokens are only text, or token ids.
            params: the settings; those of `params` if None. A stop string that is a special token ends the text too,
                though that token has no text.

        Raises:
            BadInput: the prompt is empty, contains something that is not a token id, or is too long for the context;
                or the request needs more cache than there is, or a token that does not end the text and has none.
        """
        params = params or self.params()
        ids = prompt_ids(prompt, self.tokenizer, self.vocab_size)
        params.check_vocabulary(self.vocab_size)
        limit = self._limit(len(ids), params)
        seed = secrets.randbits(53) if params.seed is None else params.seed
        request = Request(self._next_id, ids, params, seed)
        self._next_id += 1
        named = (self.tokenizer.backend.token_to_id(text) for text in params.stop)
        special = [i for i in named if i in self.tokenizer.special_ids]
        stop = frozenset((*params.stop_token_ids, *special, *(() if params.ignore_eos else self.eos_ids)))
        if params.min_tokens and stop.issuperset(range(self.vocab_size)):
            raise BadInput("every token ends the text, so it cannot have min_tokens", field="stop_token_ids")
        request.sequences = [Sequence(request, index, self.tokenizer, limit, stop) for index in range(params.n)]
        if params.max_tokens == 0 and not (params.echo and params.logprobs is not None):
            for sequence in request.sequences:
                self._ready += [*sequence.echo(len(ids)), sequence.finish("length")]
        else:
            self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request, queued or running: its memory is free at once and no more outputs of it come."""
        if request.finished:
            return
        request.cancelled = True
        for sequence in request.sequences:
            self.scheduler.remove(sequence)
        self._ready = [output for output in self._ready if output.request != request.id]

    def step(self) -> list[StepOutput]:
        """Run the model once over everything that runs; the outputs of it, possibly none."""
        outputs, self._ready = self._ready, []
        work = self.scheduler.schedule()
        if not work:
            return outputs
        if self.speculation is not None:
            work = self.speculation.extend(work, len(self.scheduler.running))
        began, row = time.perf_counter(), 0
        if self._device_sampler is not None:
            work = self._sample_on_device(self._device_sampler, work, outputs)
        logits = self._paired.forward([chunk for _, chunk in work])
        if len(logits) and math.isnan(logits.max()):
            raise _nan()
        for sequence, chunk in work:
            sequence.computed = chunk.start + len(chunk.tokens) - chunk.drafted
            self._advance(sequence, chunk, logits, row, outputs)
            row += chunk.logits
        if self.speculation is not None:
            self.speculation.took(work, time.perf_counter() - began)
        return outputs

    def room(self, prompt: int) -> int:
        """Maximum number of tokens that can follow a prompt of so many: to the end of the context or of the memory."""
        pool, low, high = self.scheduler.pool, prompt, self.context
        while low < high:  # by bisection, since the pool only says what a number of positions needs
            middle = (low + high + 1) // 2
            low, high = (middle, high) if pool.bytes_for(middle) <= pool.budget else (low, middle - 1)
        return max(0, low - prompt)

    def memory(self) -> dict[str, int]:
        """Bytes: of the runners' own weights, of caches used by what runs, and of caches kept for reuse.

        A draft model's are part of all of them; "draft_weights" are those of "weights" that are its own.
        """
        pool, weights = self.scheduler.pool, self._paired.weight_bytes
        caches = {"cache_reserved": pool.reserved, "cache_kept": pool.kept, "cache_budget": pool.budget}
        return {"weights": weights, "draft_weights": weights - self.runner.weight_bytes, **caches}

    def _limit(self, prompt: int, params: SamplingParams) -> int:
        """Maximum number of tokens of a sequence whose prompt has so many; checks that there is memory for them."""
        room = self.context if params.max_tokens == 0 else self.context - 1
        if prompt > room:
            problem = f"the prompt is {prompt} tokens long, and the context holds {self.context} with what is written"
            raise BadInput(problem, field="prompt", hint=f"Shorten it to at most {room} tokens.")
        limit, pool = min(prompt + params.max_tokens, self.context), self.scheduler.pool
        if pool.bytes_for(limit) > pool.budget:
            problem = f"{limit} positions need {pool.bytes_for(limit):,} bytes of cache, and there are {pool.budget:,}"
            hint = "Ask for fewer tokens or give the engine more cache_bytes."
            raise BadInput(problem, field="max_tokens", hint=hint)
        return limit

    def _advance(
        self, sequence: Sequence, chunk: ScheduledChunk, logits: Tensor, row: int, outputs: list[StepOutput]
    ) -> None:
        """Add the outputs of a chunk: echoed prompt tokens, or the next token and those whose drafts are accepted.

        Args:
            logits: of the whole step; those of the chunk begin at `row`.
        """
        prompt, end = len(sequence.request.prompt), row + chunk.logits
        if chunk.start < prompt:
            described = logits[row:end] if sequence.wants_prompt_logits else None
            outputs += sequence.echo(min(sequence.computed, prompt), described, chunk.start)
        if sequence.pending or not chunk.logits:
            return
        if sequence.params.max_tokens == 0:
            outputs.append(sequence.finish("length"))
            self.scheduler.remove(sequence)
            return
        accepted = 0
        for draft in (*chunk.tokens[len(chunk.tokens) - chunk.drafted :], None):
            token = sequence.sampler.sample(logits[end - 1 - chunk.drafted + accepted], sequence.written)
            outputs.append(sequence.append(token))
            accepted += token.token_id == draft
            if sequence.finish_reason or token.token_id != draft:
                break
            sequence.computed += 1  # the draft was accepted, and its keys and values are in the cache
        if sequence.finish_reason:
            self.scheduler.remove(sequence)
        if chunk.drafted and self.speculation is not None:
            self.speculation.learn(sequence, chunk.drafted, accepted)

    def _sample_on_device(self, sampler: DeviceSampler, work: Work, outputs: list[StepOutput]) -> Work:
        """Run and draw the next tokens that the device can draw; the rest of the work."""
        drawn = [sequence for sequence, _ in work if sampler.can_sample(sequence)]
        for sequence, token_id in zip(drawn, sampler.sample(drawn), strict=True):
            if token_id < 0:
                raise _nan()
            sequence.computed += 1
            outputs.append(sequence.append(SampledToken(token_id)))
            if sequence.finish_reason:
                self.scheduler.remove(sequence)
        return [(sequence, chunk) for sequence, chunk in work if sequence not in drawn]


def _sampling_defaults(found: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What generation_config.json says of sampling, as fields of SamplingParams; CheckpointError where one is wrong."""
    names = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")}
    names["max_new_tokens"] = "max_tokens"
    defaults = {ours: found[theirs] for theirs, ours in names.items() if theirs in found}
    if found.get("do_sample") is False:
        defaults = {name: value for name, value in defaults.items() if name in ("repetition_penalty", "max_tokens")}
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except BadInput as error:
        raise CheckpointError(error.message, field=f"{directory / 'generation_config.json'}: {error.field}") from None
    return defaults


def _nan() -> RunFailed:
    return RunFailed("the model's logits are NaN", hint="Its weights are damaged, or training diverged.")
