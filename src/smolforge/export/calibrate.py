"""Round the weights of a model to four bits for an export, by the inputs that its layers see in some text.

The text is one that the model writes itself, so nothing has to be at hand and the file is the same each time, or it is
read from sources.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from smolforge.checkpoint.locate import load_model
from smolforge.config import DataConfig
from smolforge.data import Corpus
from smolforge.errors import DataError
from smolforge.generation import Engine, SamplingParams
from smolforge.generation.quantize import calibrate

if TYPE_CHECKING:
    from torch import Tensor

    from smolforge.model.architecture import CausalLM
    from smolforge.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
TEXTS, LENGTH = 16, 256


def calibrated_weights(directory: Path, kind: str, sources: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """The weights of a model in fp32, with those blocks of GGUF that text chooses as their attribute `blocks`.

    Args:
        kind: Q4_0 or Q4_1.
        sources: texts by their weight; what the model writes itself unless given.

    Raises:
        DataError: the sources hold too little text.
    """
    import torch

    module, tokenizer, _ = load_model(directory, dtype=torch.float32)
    length = min(LENGTH, module.config.max_position_embeddings)
    ids = _read(tokenizer, sources, length) if sources else _written(module, tokenizer, length)
    origin = ", ".join(sources) if sources else "the model itself"
    logger.info("rounding to %s by %s tokens of text of %s", kind, f"{ids.numel():,}", origin)
    calibrate(module, ids, kind)
    return dict(module.named_parameters())


def _written(module: CausalLM, tokenizer: Tokenizer, length: int) -> Tensor:
    """Texts that a model writes at temperature 1, (TEXTS, length)."""
    import torch

    engine = Engine.from_model(module, tokenizer, quantize="bf16")
    params = SamplingParams(temperature=1, top_p=1, max_tokens=length - 1, ignore_eos=True, seed=0, n=TEXTS)
    begin = tokenizer.bos_id
    texts = [[begin] for _ in range(TEXTS)]
    for output in engine.stream([[begin]], params):
        if output.token_id is not None:
            texts[output.index].append(output.token_id)
    return torch.tensor(texts)


def _read(tokenizer: Tokenizer, sources: Mapping[str, float], length: int) -> Tensor:
    """The first tokens of sources, (texts, length)."""
    import torch

    ids: list[int] = []
    with Corpus.open(DataConfig(sources=dict(sources), on_error="skip")) as corpus:
        for text, ends in corpus.parts():
            ids += tokenizer.encode(text[: 8 * TEXTS * length]) + [tokenizer.eos_id] * ends
            if len(ids) >= TEXTS * length:
                break
    count = min(TEXTS, len(ids) // length)
    if not count:
        raise DataError(
            f"holds {len(ids)} tokens, {length} at least are needed", field="--calibration",
            hint="Give more text, or none: the model then writes it.",
        )  # fmt: skip
    return torch.tensor(ids[: count * length]).view(count, length)
