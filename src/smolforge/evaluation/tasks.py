"""Tasks of lm-eval (hellaswag, arc_easy, ...), scored by our model.

lm-eval brings the tasks, the few-shot examples and the metrics; `SmolforgeLM` answers its three questions: how likely
is a continuation, how likely is a whole text, what comes next. The answers are those of lm-eval's own `hf` model: the
same tokens, the same truncation from the left, the same token before an empty context. What is ours is the arithmetic:
requests of like length go together, and the head is computed at the positions that are asked about, not at
all of them.

Tasks come from lm-eval itself, whose data is on the Hub, or from YAML files of one's own, which may name local data:

    task: my_task
    dataset_path: json
    dataset_kwargs: {data_files: {test: questions.jsonl}}
    output_type: multiple_choice
    ...

https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/new_task_guide.md
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tokenizers import Tokenizer as Backend

from smolforge.errors import BadInput, SmolforgeError, SourceUnavailable, nearest
from smolforge.generation.engine import Engine
from smolforge.generation.sampling_params import MAX_STOPS, SamplingParams

if TYPE_CHECKING:
    from smolforge.model.architecture import CausalLM
    from smolforge.tokenizer import Tokenizer

# A question to the model: (context, continuation) as text or None, and both as tokens.
Asked = tuple[tuple[str, str] | None, list[int], list[int]]


class SmolforgeLM(TemplateLM):
    """A model as lm-eval knows models.

    Args:
        model: in evaluation mode, on its device.
        batch: requests at a time.
        say: told what an answer leaves out.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        batch: int = 8,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__()
        self.module, self.text, self.batch_size, self.say = model, tokenizer, batch, say
        # Text is only ever text for us; in a task's text special tokens are commands, as `hf` reads it.
        self._backend = Backend.from_str(tokenizer.backend.to_str())
        self._backend.encode_special_tokens = False
        self._device = next(model.parameters()).device
        self.max_length = model.config.max_position_embeddings
        self.max_gen_toks = 256

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the BOS token where the tokenizer names one."""
        token = self.text.config.get("bos_token")
        name = token.get("content") if isinstance(token, dict) else token
        found = self.text.backend.token_to_id(name) if isinstance(name, str) else None
        return self.text.eos_id if found is None else found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a task's text, with what the tokenizer adds by itself unless the text begins so."""
        if add_special_tokens is None:
            bos = self.text.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(bos)
        return self._backend.encode(string, add_special_tokens=add_special_tokens).ids

    def _loglikelihood_tokens(self, requests: Sequence[Asked], **kwargs: Any) -> list[tuple[float, bool]]:  # type: ignore[override]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # Longest first: what does not fit in memory shows at once, and like lengths waste no padding.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        cut = 0
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            cut += sum(len(requests[i][1]) + len(requests[i][2]) > self.max_length + 1 for i in chunk)
            for i, answer in zip(chunk, self._score([requests[i] for i in chunk]), strict=True):
                answers[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)  # type: ignore[arg-type]
        if cut:
            self.say(
                f"{cut} of {len(requests)} requests are longer than {self.max_length} tokens: their beginnings are cut"
            )
        return answers

    @torch.no_grad()
    def _score(self, asked: Sequence[Asked]) -> Iterator[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding writes."""
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in asked]
        width = max(len(row) for row in rows) - 1
        inputs = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):
            inputs[place, : len(row) - 1] = torch.tensor(row[:-1])
        hidden = self.module.decoder(inputs.to(self._device))
        for place, (row, (_, _, continuation)) in enumerate(zip(rows, asked, strict=True)):
            n = len(continuation)
            logits = self.module.head(hidden[place, len(row) - 1 - n : len(row) - 1])  # (n, V)
            logs = logits.log_softmax(-1, dtype=torch.float32)
            targets = torch.tensor(continuation, device=self._device)
            chosen = logs.gather(1, targets[:, None])[:, 0]
            yield float(chosen.sum()), bool((logs.argmax(-1) == targets).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that overlap by one token."""
        windows: list[Asked] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for context, continuation in map(utils.make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string; those with equal settings go together."""
        engine = Engine.from_model(self.module, self.text, max_batch=self.batch_size)
        eos = self.text.decode([self.eot_token_id], skip_special_tokens=False)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            knobs: dict[str, Any] = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks))
            until = knobs.pop("until", None)
            # A copy: it appends to the task's own list.
            stops = handle_stop_sequences(list(until) if isinstance(until, list) else until, eos=eos)
            room = self.max_length - int(knobs["max_gen_toks"])
            if room < 1:
                raise BadInput(
                    f"a task asks for {knobs['max_gen_toks']} tokens, and the model has {self.max_length} positions",
                    field="--tasks",
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            # Stopping early is only to save time: the text is cut below as lm-eval cuts it.
            sampling = _sampling(knobs, tuple(stop for stop in stops if stop and stop != eos)[:MAX_STOPS])
            for step in engine.stream(prompts, sampling):
                texts[numbers[step.request]] += step.text
            for number in numbers:
                texts[number] = postprocess_generated_text(generation=texts[number], stop=stops, think_end_token=None)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts


def _sampling(knobs: dict[str, Any], stop: tuple[str, ...]) -> SamplingParams:
    """lm-eval's generation arguments; without do_sample it is greedy."""
    known = {key: knobs[key] for key in ("top_p", "top_k", "min_p", "repetition_penalty") if key in knobs}
    sampled = bool(knobs.get("do_sample"))
    temperature = float(knobs.get("temperature", 1.0)) if sampled else 0.0
    settings = {"top_p": 1.0, **known}
    return SamplingParams(max_tokens=int(knobs["max_gen_toks"]), temperature=temperature, stop=stop, **settings)


def run_tasks(
    model: CausalLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    task_files: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Metrics of a model on tasks: {task: {metric: value}}, as lm-eval names them.

    Args:
        tasks: names of lm-eval's tasks or of those in `task_files`.
        task_files: a folder of task files (YAML), which come before lm-eval's own.
        shots: examples before each question; the task's own number unless given.
        limit: questions of each task; all unless given.

    Raises:
        BadInput: there is no such task, or its file or data cannot be used.
        SourceUnavailable: the data of a task is on the Hub, which cannot be reached.
    """
    from lm_eval.evaluator import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, task_files)
    try:
        found = simple_evaluate(
            model=SmolforgeLM(model, tokenizer, batch=batch, say=say),  # type: ignore[arg-type]
            tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
            bootstrap_iters=1000,
        )  # fmt: skip
    except SmolforgeError:
        raise
    except Exception as error:  # a task is a program of others, with errors of all kinds
        raise _explain(error) from error
    assert found is not None
    results: dict[str, Any] = dict(found.get("results", {}))
    return {name: _metrics(values) for name, values in results.items()}


def _manager(tasks: Sequence[str], task_files: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if task_files is not None:
        if not task_files.is_dir():
            raise BadInput(f"no such folder: {task_files}", field="--task-files")
        # Reading thousands of lm-eval's own files takes seconds, and one's own may be all that is asked for.
        own = TaskManager(include_path=str(task_files.resolve()), include_defaults=False)
        if all(name in own.all_tasks for name in tasks):
            return own
    manager = TaskManager(include_path=str(task_files.resolve()) if task_files else None)
    for name in tasks:
        if not manager.match_tasks([name]):
            guess = nearest(name, manager.all_tasks)
            hint = f"Did you mean {guess!r}? " if guess else ""
            raise BadInput(
                f"unknown task {name!r}", field="--tasks", hint=f"{hint}`lm-eval ls tasks` lists those of lm-eval."
            )
    return manager


def _explain(error: Exception) -> SmolforgeError:
    text = " ".join(str(error).split())[:400]
    away = isinstance(error, (ConnectionError, TimeoutError)) or "offline" in type(error).__name__.lower()
    if away or "Hub" in text or "offline" in text.lower():
        hint = "Tasks with local data: give their files with --task-files."
        return SourceUnavailable(f"the data of a task cannot be reached: {text}", field="--tasks", hint=hint)
    return BadInput(f"a task cannot be run: {type(error).__name__}: {text}", field="--tasks")


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's "acc,none" and the like without the name of a filter that does nothing."""
    kept = {}
    for key, value in values.items():
        metric, _, which = key.partition(",")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            kept[metric if which in ("", "none") else f"{metric} ({which})"] = value
    return kept
