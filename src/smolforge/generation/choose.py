"""Which runner for a model on this machine, and whether a draft runs beside it: decided once, with reasons in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smolforge.errors import BadInput
from smolforge.generation import quantize as precisions
from smolforge.generation.draft import MOST
from smolforge.generation.draft_model import DraftModel
from smolforge.generation.native import NativeRunner
from smolforge.generation.runner import ModuleRunner, Runner
from smolforge.generation.static import StaticRunner
from smolforge.generation.stock import StockRunner
from smolforge.kernels import NativeUnavailable

if TYPE_CHECKING:
    from smolforge.tokenizer import Tokenizer

_STORED = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def choose_runner(module: Any, quantize: str = "auto", *, threads: int | None = None) -> tuple[Runner, list[str]]:
    """The fastest runner for a module's weights as they are now, and what was decided.

    Args:
        module: a model of `model/registry.py`.
        quantize: fp32, bf16, int8, int4, "auto", or "none" for the precision the weights have.
        threads: of the native step; torch's own number unless given.

    Raises:
        BadInput: there is no such precision.
        RunFailed: it would hide weights that are no numbers.
    """
    weight = next(module.parameters())
    if quantize == "none":
        quantize = _STORED.get(weight.dtype, "bf16")
    parameters = sum(p.numel() for p in module.parameters())
    precision, reason = precisions.choose(quantize, parameters, weight.device.type)
    if module.config.architecture != "llama":
        runner = ModuleRunner(module)
        why = f"the fast paths and their precisions are for Llama, not {module.config.architecture}"
        return runner, [f"runner: {runner.name} in {_STORED.get(weight.dtype, weight.dtype)}; {why}"]
    if precision in ("int8", "int4"):
        precisions.check_finite(module)
    decisions = [f"precision: {reason}"]
    if weight.device.type != "cpu":
        runner = StaticRunner(module, precision)
        return runner, [*decisions, *runner.decisions, f"runner: {runner.name}"]
    try:
        runner = NativeRunner(module, precision, threads=threads)
    except NativeUnavailable as error:
        runner = StockRunner(module, precision)
        return runner, [*decisions, f"runner: {runner.name}; no native step: {error.message}"]
    return runner, [*decisions, f"runner: {runner.name}"]


def choose_draft(
    module: Any, tokenizer: Tokenizer, runner: Runner, of: Tokenizer, *, name: str = "the draft model",
    threads: int | None = None,
) -> tuple[DraftModel | None, list[str]]:  # fmt: skip
    """A draft model beside a runner, and what was decided; None where its guesses could change the text.

    Args:
        module: the draft, a model of `model/registry.py`.
        tokenizer: the draft's.
        runner: of the model it drafts for.
        of: the model's tokenizer.
        name: of the draft, for people.
        threads: of the draft's runner.

    Raises:
        BadInput: the draft's token ids are not the model's.
    """
    check_same_tokens(tokenizer, of)
    size, theirs = module.config.vocab_size, runner.config.vocab_size
    if size != theirs:
        raise BadInput(
            f"it writes {size:,} token ids and the model {theirs:,}, though their tokenizers agree",
            field="draft",
            hint="Both need the same vocab_size in their config.json.",
        )
    if not runner.batch_invariant:
        return None, [
            f"draft: {name} is not used; on this runner ({runner.name}) a row's last bits depend on the rows beside "
            "it, so guesses could change the text"
        ]
    # Its precision touches how often it is right, never the text, so it is always the fastest that keeps the quality.
    mine, decisions = choose_runner(module, "auto", threads=threads)
    ratio = _weight_bytes(mine) / _weight_bytes(runner)
    draft = DraftModel(mine, ratio)
    what = f"draft: {name}, {mine.name}; its weights have {ratio:.2f} of the bytes of the model's"
    if not draft.worthwhile(1.0, 1):
        what += f", so even if all of up to {MOST} guesses were right it could not pay, and it is not asked"
    else:
        what += "; it guesses while that pays, and what is written stays the same"
    if draft.context < runner.config.max_position_embeddings:
        what += f"; up to its own context of {draft.context:,} tokens"
    return draft, [what, *(f"draft {line}" for line in decisions if not line.startswith("runner"))]


def check_same_tokens(draft: Tokenizer, model: Tokenizer) -> None:
    """Check that the ids of both mean the same tokens.

    Raises:
        BadInput: they do not; says where.
    """
    mine, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (draft, model))
    if mine == theirs:
        return
    if len(mine) != len(theirs):
        what = f"it has {len(mine):,} tokens and the model's {len(theirs):,}"
    else:
        first = min(token_id for _, token_id in mine.items() ^ theirs.items())
        what = f"token {first} is {draft.token_text(first)!r} in it and {model.token_text(first)!r} in the model's"
    raise BadInput(
        f"its tokenizer is not the model's: {what}",
        field="draft",
        hint="A draft must have been trained with the model's own tokenizer: the same tokens under the same ids.",
    )


def _weight_bytes(runner: Any) -> int:
    """Bytes of the weights that a step reads, whoever holds them."""
    return runner.weight_bytes or sum(parameter.nbytes for parameter in runner.module.parameters())
