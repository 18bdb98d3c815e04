"""The CUDA runner: a static cache, CUDA graphs, and sampling on the device.

Decoding a token on a GPU is limited by starting its kernels, not by running them, unless the whole step is one recorded
graph, and a graph needs shapes that never change. So every sequence has a slot in one fixed tensor of keys and values,
and row i of a step is slot i. A step is recorded once for each batch size (a power of two above the highest slot in
use), each number of keys (a power of two) and whether it is greedy. Rows without a sequence write to a position that
none reads. The step is the kernels of `fused.py` where they compute what the module computes, else the module itself.

A prompt's chunk is one sequence through the module, in a graph as well: recorded once for each width and number of
keys, both powers of two. It reads and writes a slot of its own, so that one graph serves all sequences. Where logits of
more than its last token are wanted, the module runs without a graph.

Shapes: B rows, T tokens, S keys, L positions of a slot, K key/value heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

import copy
import heapq
import logging
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smolforge.cuda_graph import RecordedCalls
from smolforge.devices import half_precision
from smolforge.errors import in_one_line
from smolforge.generation.kv_cache import TensorCache
from smolforge.generation.runners.cpu import Precision
from smolforge.generation.runners.module import ModuleRunner, evaluating
from smolforge.generation.sequence import ScheduledChunk, Sequence

logger = logging.getLogger(__name__)

# The rows of a step's input, one column for each slot, in float64, which holds token ids and positions exactly. A
# chunk of a prompt has the first two, with a column for each token.
TOKEN, POSITION, UNIFORM, TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE = range(10)
FEWEST_KEYS, FEWEST_TOKENS = 128, 16  # shorter texts, and shorter chunks of prompts, share one graph


class SlotCache(TensorCache):
    """One slot of the runner's memory; `counted` tokens of its sequence are in the counts that penalties use."""

    def __init__(self, runner: CudaRunner, slot: int) -> None:
        self._runner, self.slot, self.length, self.counted = runner, slot, 0, 0
        self.capacity = runner.positions

    @property
    def memory(self) -> Tensor:  # type: ignore[override]
        """Keys and values, (layers, 2 K, L + 1, d): looked up, since memory moves when slots are added."""
        return self._runner.memory[self.slot]


class StaticCache:
    """The first B slots in one step: fixed shapes, and positions as a tensor.

    Args:
        memory: (slots, layers, 2 K, L + 1, d).
        positions: of the tokens, (B, T); L for one that is none, whose keys no other sees.
        keys: S, more than any position in use.
    """

    def __init__(self, memory: Tensor, positions: Tensor, keys: int) -> None:
        self._memory, self._positions, self._keys = memory[: len(positions)], positions, keys
        # (B, 1, T, S): the keys that a token may see.
        self.mask = (torch.arange(keys, device=memory.device) <= positions[..., None])[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, d) at the positions; the first S of each slot, (B, K, S, d), as views."""
        slots, new = self._memory[:, layer], torch.cat((k, v), 1)
        slots.scatter_(2, self._positions[:, None, :, None].expand_as(new), new)
        keys, values = slots[:, :, : self._keys].split(k.shape[1], 1)
        return keys, values


class CudaRunner(ModuleRunner):
    """Decodes on a GPU, all sequences of a step together.

    Args:
        module: a model of `smolforge.model` on the device; weights of another precision are copied.
        precision: fp32, or bf16, which is fp16 on a GPU without bf16.
    """

    batch_invariant = False  # the batch size chooses the kernels, and a prompt's kernels are not a token's
    most_caches = 1 << 20

    def __init__(self, module: Any, precision: Precision) -> None:
        stored = next(module.parameters())
        dtype = torch.float32 if precision == "fp32" else half_precision(stored.device)
        super().__init__(module if stored.dtype == dtype else copy.deepcopy(module).to(dtype))
        self.weight_bytes = 0 if stored.dtype == dtype else sum(p.nbytes for p in self.module.parameters())
        self._device, self.positions = stored.device, self.config.max_position_embeddings
        c, heads = self.config, 2 * self.config.num_key_value_heads
        shape = (0, c.num_hidden_layers, heads, self.positions + 1, c.head_dim)
        self.memory = torch.empty(shape, dtype=dtype, device=self._device)
        self._in_prompt = torch.empty(0, c.vocab_size, dtype=torch.bool, device=self._device)
        self._written = torch.empty(0, c.vocab_size, dtype=torch.int32, device=self._device)
        self._free: list[int] = []
        self._steps, self._prompts = RecordedCalls(), RecordedCalls()
        self._prompt_memory = self.memory  # (1, layers, 2 K, L + 1, d) as soon as there are slots
        self._fused = self._fused_step()
        where = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu, without graphs"
        self.name = f"CUDA graphs, {'fp16' if dtype == torch.float16 else precision} on {where}"

    def default_cache_bytes(self) -> int:
        """Half of the GPU's free memory."""
        return torch.cuda.mem_get_info(self._device)[0] // 2 if self._device.type == "cuda" else 2 << 30

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a slot, which has the model's whole context whatever `capacity` is."""
        return TensorCache.bytes_for(self.config, self.positions + 1, self.memory.dtype)

    def new_cache(self, capacity: int) -> SlotCache:
        """An empty slot, the lowest that is free; it is free again when the cache is dropped."""
        if not self._free:
            self._add_slots(max(1, min(len(self.memory), self.most_caches - len(self.memory))))
        cache = SlotCache(self, heapq.heappop(self._free))
        # An infinity that another sequence left would become NaN where its weight is 0.
        for tensor in (self.memory, self._in_prompt, self._written):
            tensor[cache.slot] = 0
        weakref.finalize(cache, heapq.heappush, self._free, cache.slot).atexit = False
        return cache

    @torch.no_grad()
    def forward(self, chunks: Many[ScheduledChunk]) -> Tensor:
        """Run the chunks one by one, those with logits of at most one token as CUDA graphs."""
        run = super().forward
        rows = [run([chunk]) if chunk.logits > 1 else self._read(chunk) for chunk in chunks]
        return torch.cat([torch.empty(0, self.config.vocab_size), *rows])

    def _read(self, chunk: ScheduledChunk) -> Tensor:
        """Run a chunk's tokens; the logits of the last one on the host, (1, V), or (0, V) where none are wanted."""
        start, end = chunk.start, chunk.start + len(chunk.tokens)
        keys, inputs = self._keys(end), self._idle_inputs(max(_power_of_two(end - start), FEWEST_TOKENS), rows=2)
        inputs[:, : end - start] = torch.tensor([chunk.tokens, range(start, end)], dtype=torch.float64)
        slot: Any = chunk.cache
        # With the zeros behind the text: what another text left there may be infinite.
        self._prompt_memory[0, :, :, :keys] = slot.memory[:, :, :keys]
        logits = self._run(self._prompts, (inputs.shape[1], keys), partial(self._read_step, keys), inputs)
        slot.memory[:, :, start:end] = self._prompt_memory[0, :, :, start:end]
        return logits[: chunk.logits].float().cpu()

    def _read_step(self, keys: int, inputs: Tensor) -> Tensor:
        """The logits after a chunk, (1, V); what a graph records."""
        tokens, positions = inputs.long().split(1)
        cache = StaticCache(self._prompt_memory, positions, keys)
        hidden = self.module.decoder(tokens, positions=positions, cache=cache)
        last = (positions < self.positions).sum(1) - 1
        return self.module.head(hidden[0].index_select(0, last))

    def can_sample(self, sequence: Sequence) -> bool:
        """Whether the next token can be drawn on the device: no log-probabilities, bias, grammar, typical sampling."""
        p = sequence.params
        forbids = sequence.stop_token_ids and sequence.written < p.min_tokens
        plain = p.logprobs is None and not p.logit_bias and p.typical_p == 1 and p.grammar is None and not forbids
        return plain and sequence.pending == 1 and sequence.written > 0

    @torch.no_grad()
    def sample(self, sequences: list[Sequence]) -> list[int]:
        """Run the last token of each sequence and draw the next one; -1 where the logits are NaN."""
        if not sequences:
            return []
        self._count([sequence for sequence in sequences if _has_penalty(sequence)])
        slots = [sequence.cache.slot for sequence in sequences]
        rows, last = _power_of_two(max(slots) + 1), max(sequence.computed for sequence in sequences)
        keys = self._keys(last + 1)
        greedy = all(sequence.params.greedy and not _has_penalty(sequence) for sequence in sequences)
        inputs = self._idle_inputs(min(rows, len(self.memory)))
        inputs[:, slots] = torch.tensor([_inputs_of(s) for s in sequences], dtype=torch.float64).T
        tokens = self._decode(keys, greedy, inputs).tolist()
        return [tokens[slot] for slot in slots]

    def _decode(self, keys: int, greedy: bool, inputs: Tensor) -> Tensor:
        shape, step = (inputs.shape[1], keys, greedy), partial(self._step, keys, greedy)
        return self._run(self._steps, shape, step, inputs)

    def _step(self, keys: int, greedy: bool, inputs: Tensor) -> Tensor:
        """The next token of each row, (B,); what a graph records."""
        tokens, positions = inputs[TOKEN].long(), inputs[POSITION].long()
        logits = self._logits(tokens, positions, keys).float()
        if greedy:
            return torch.where(logits.isnan().any(-1), -1, logits.argmax(-1))
        return sample_batch(logits, inputs, self._in_prompt[: len(tokens)], self._written[: len(tokens)])

    def _logits(self, tokens: Tensor, positions: Tensor, keys: int) -> Tensor:
        if self._fused is not None:
            try:
                return self._fused(tokens, positions, self.memory, keys)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton's are of many kinds: no C compiler, no Python headers, a GPU too old
                logger.warning(f"decoding: slower, its kernels fail on this machine ({in_one_line(error)})")
                self._fused = None
                self._steps.clear()  # they use its tables
        cache = StaticCache(self.memory, positions[:, None], keys)
        return self.module(tokens[:, None], positions=positions[:, None], cache=cache)[:, 0]

    def _fused_step(self) -> Any:
        """A `FusedStep`, or None where the module itself has to run."""
        if self._device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(self._device) < (8, 0):
            return None
        from smolforge.generation.runners.fused import fused_step  # imports Triton, which takes time

        return fused_step(self.module, self.positions)

    def _run(
        self, calls: RecordedCalls, shape: tuple[int, ...], step: Callable[[Tensor], Tensor], inputs: Tensor
    ) -> Tensor:
        with evaluating(self.module):
            given = inputs.to(self._device, non_blocking=True)
            if self._device.type != "cuda":
                return step(given)
            with torch.cuda.device(self._device):
                return calls(step, [given], shape)

    def _keys(self, length: int) -> int:
        """How many keys a step reads for texts of up to so many tokens."""
        return min(max(_power_of_two(length), FEWEST_KEYS), self.positions)

    def _idle_inputs(self, columns: int, rows: int = 10) -> Tensor:
        """The input of a step without sequences, (10, B), or of a prompt's chunk without tokens, (2, T)."""
        inputs = torch.zeros(rows, columns, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        inputs[POSITION] = self.positions
        return inputs

    @torch.inference_mode(False)  # they outlive the mode of who wants the first ones
    def _add_slots(self, count: int) -> None:
        first = len(self.memory)
        if not first:
            self._prompt_memory = self.memory.new_zeros(1, *self.memory.shape[1:])
        for name in ("memory", "_in_prompt", "_written"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(first + count, *old.shape[1:])
            new[:first] = old
            setattr(self, name, new)
        self._steps.clear()  # they use the old memory
        self._free += range(first, first + count)  # a heap, since it was empty

    def _count(self, sequences: list[Sequence]) -> None:
        """Bring the counts that penalties use up to date."""
        for sequence in sequences:
            cache, prompt = sequence.cache, len(sequence.request.prompt)
            new = torch.tensor(sequence.tokens[cache.counted :], device=self._device)
            seen = max(prompt - cache.counted, 0)
            self._in_prompt[cache.slot, new[:seen]] = True
            self._written[cache.slot].index_add_(0, new[seen:], torch.ones_like(new[seen:], dtype=torch.int32))
            cache.counted = len(sequence.tokens)


def sample_batch(logits: Tensor, inputs: Tensor, in_prompt: Tensor, written: Tensor) -> Tensor:
    """Draw a token for each row, as `Sampler` does, row by row its own settings and uniform number.

    Args:
        logits: fp32, (B, V).
        inputs: (10, B), as `CudaRunner` makes them; temperature 0 is greedy.
        in_prompt: whether the prompt has a token, (B, V) bool.
        written: how often a token was written, (B, V) int32.

    Returns:
        Token ids (B,); -1 where the logits are NaN.
    """
    knobs = inputs.float()[:, :, None]  # (10, B, 1)
    repetition, written_once = knobs[REPETITION], written > 0
    scores = torch.where(logits < 0, logits * repetition, logits / repetition)
    scores = torch.where(in_prompt | written_once, scores, logits)
    scores = scores - written * knobs[FREQUENCY] - written_once * knobs[PRESENCE]
    temperature = knobs[TEMPERATURE]
    values, order = (scores / torch.where(temperature > 0, temperature, 1)).sort(dim=-1, descending=True, stable=True)
    last = torch.where(inputs[TOP_K] > 0, inputs[TOP_K], values.shape[1]).clamp(max=values.shape[1]).long() - 1
    weights = torch.where(values >= values.gather(1, last[:, None]), (values - values[:, :1]).exp(), 0)
    total = weights.cumsum(-1, dtype=torch.float64)
    top_p, min_p = inputs[TOP_P, :, None], inputs[MIN_P, :, None]
    keep = ((total - weights < top_p * total[:, -1:]) | (top_p >= 1)) & (weights >= min_p)
    keep[:, 0] = True
    # The draw is by ascending id, as the host's, so that both find the same token for the same uniform number.
    kept = torch.zeros_like(weights).scatter(1, order, torch.where(keep, weights, 0))
    cumulative = kept.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, inputs[UNIFORM, :, None] * cumulative[:, -1:], right=True)[:, 0]
    highest = (torch.arange(kept.shape[1], device=kept.device) * (kept > 0)).amax(-1)
    tokens = torch.where(inputs[TEMPERATURE] > 0, torch.minimum(drawn, highest), scores.argmax(-1))
    return torch.where(logits.isnan().any(-1), -1, tokens)


def _inputs_of(sequence: Sequence) -> list[float]:
    """The input of a sequence, in the order of the constants at the head of this file."""
    p, state = sequence.params, [sequence.tokens[-1], sequence.computed, sequence.sampler.uniform(sequence.written)]
    penalties = p.repetition_penalty, p.frequency_penalty, p.presence_penalty
    return [*state, p.temperature, p.top_k, p.top_p, p.min_p, *penalties]


def _has_penalty(sequence: Sequence) -> bool:
    p = sequence.params
    return (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) != (1, 0, 0)


def _power_of_two(n: int) -> int:  # not less than n
    return 1 << (n - 1).bit_length()
