"""Score a model on lm-eval's tasks (hellaswag, arc_easy, ...).

lm-eval brings the tasks, the few-shot examples, the metrics and its own model for Hugging Face checkpoints, `HFLM`. A
checkpoint of a Llama is such a model and is scored as it stands. An architecture that transformers does not have is
wrapped so that `HFLM` can ask it for logits.

Tasks come from lm-eval itself, whose data is on the Hub, or from YAML files of your own, which may name local data:

    task: my_task
    dataset_path: json
    dataset_kwargs: {data_files: {test: questions.jsonl}}
    output_type: multiple_choice
    ...

https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/new_task_guide.md
"""

# Decorators of transformers and lm-eval hide the signatures of their classes from type checkers.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from smolforge.checkpoint.format import read_config
from smolforge.checkpoint.locate import load_model
from smolforge.devices import choose_device
from smolforge.errors import BadInput, SmolforgeError, SourceUnavailable, nearest
from smolforge.gguf_file import is_gguf
from smolforge.model.architecture import architecture_of
from smolforge.tokenizer import Tokenizer


class _Wrapped(PreTrainedModel, GenerationMixin):
    """Any of our models as transformers' generation and `HFLM` call models; without a cache."""

    config_class = PretrainedConfig

    def __init__(self, module: nn.Module, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.module = module
        self.generation_config = GenerationConfig()

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().generate(*args, **{**kwargs, "use_cache": False})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        # Padding on the left is a document of its own: attention stops at its border, and positions start after it.
        padded = attention_mask is not None and not bool(attention_mask.all())
        return CausalLMOutput(logits=self.module(input_ids, document_ids=attention_mask if padded else None))


def wrap_model(directory: Path, *, batch: int, device: str) -> HFLM:
    """lm-eval's model over a checkpoint that transformers cannot load, or over a GGUF file."""
    module, tokenizer, _ = load_model(directory, device=device)
    config = PretrainedConfig(
        vocab_size=module.config.vocab_size,
        max_position_embeddings=module.config.max_position_embeddings,
        eos_token_id=tokenizer.eos_id,
    )
    with tempfile.TemporaryDirectory() as place:
        if is_gguf(directory):
            tokenizer.save(Path(place))
        theirs = AutoTokenizer.from_pretrained(place if is_gguf(directory) else str(directory))
    return HFLM(_Wrapped(module, config).eval(), backend="causal", tokenizer=theirs, batch_size=batch, device=device)


def run_tasks(
    directory: Path, tasks: Sequence[str], *, task_files: Path | None = None, shots: int | None = None,
    limit: int | None = None, batch: int = 8, apply_chat_template: bool = False,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Metrics of a model on tasks: {task: {metric: value}}, as lm-eval names them.

    Args:
        directory: a model directory or a GGUF file.
        tasks: names of lm-eval's tasks or of those in `task_files`.
        task_files: a folder of task files (YAML), which take precedence over lm-eval's own.
        shots: examples before each question; the task's own number unless given.
        limit: questions of each task; all unless given.
        batch: questions scored at a time.
        apply_chat_template: put each question into the model's chat template, with its examples as earlier turns.

    Raises:
        BadInput: there is no such task, its file or data cannot be used, or the model has no chat template.
        SourceUnavailable: the data of a task is on the Hub, which cannot be reached.
    """
    from lm_eval.evaluator import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if apply_chat_template and Tokenizer.from_pretrained(directory).chat_template is None:
        raise BadInput(
            f"{directory} has no chat template", field="--apply-chat-template",
            hint="A base model continues text: score it without a template.",
        )  # fmt: skip
    manager = _task_manager(tasks, task_files)
    device = str(choose_device())
    if architecture_of(read_config(directory)).in_transformers and not is_gguf(directory):
        model = HFLM(str(directory), dtype="auto", batch_size=batch, device=device)
    else:
        model = wrap_model(directory, batch=batch, device=device)
    # `HFLM` warns of each request that is longer than the context, and cuts its beginning.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.WARNING)
    try:
        found = simple_evaluate(
            model=model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
            bootstrap_iters=1000, apply_chat_template=apply_chat_template,
        )  # fmt: skip
    except SmolforgeError:
        raise
    except Exception as error:  # a task is somebody else's program, with errors of all kinds
        raise _explain(error) from error
    assert found is not None
    results: dict[str, Any] = dict(found.get("results", {}))
    return {name: _metrics(values) for name, values in results.items()}


def _task_manager(tasks: Sequence[str], task_files: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if task_files is not None:
        if not task_files.is_dir():
            raise BadInput(f"no such folder: {task_files}", field="--task-files")
        # Reading thousands of lm-eval's own files takes seconds, so they are left out where they are not asked for.
        own = TaskManager(include_path=str(task_files.resolve()), include_defaults=False)
        if all(name in own.all_tasks for name in tasks):
            return own
    manager = TaskManager(include_path=str(task_files.resolve()) if task_files else None)
    for name in tasks:
        if not manager.match_tasks([name]):
            guess = nearest(name, manager.all_tasks)
            hint = f"Did you mean {guess!r}? " if guess else ""
            hint += "`lm-eval ls tasks` lists those of lm-eval."
            raise BadInput(f"unknown task {name!r}", field="--tasks", hint=hint)
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
