"""smolforge from Python: a model that is loaded once and generates, chats and scores; and its score on text.

    import smolforge

    model = smolforge.load("runs/pocket")
    print(model.generate("Once upon a time", max_tokens=50, seed=7))

`smolforge.train` is in `training/api.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from smolforge.errors import BadInput, unknown
from smolforge.generation import CHAT_SAMPLING

if TYPE_CHECKING:
    from smolforge.evaluation import Score
    from smolforge.generation import Engine, SamplingParams

Messages = Sequence[Mapping[str, Any]]


class Model:
    """A model that generates, chats and scores; made by `smolforge.load`.

    Settings of a text are the fields of `SamplingParams`: max_tokens, temperature, top_p, seed, stop and others. What
    is not given is the model's own (generation_config.json), else the default of `SamplingParams`.

    Attributes:
        engine: the `Engine`, for several requests at once, token ids and log-probabilities.
        tokenizer: its `Tokenizer`.
        directory: where it was loaded from.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokenizer, self.directory = engine, engine.tokenizer, engine.directory

    def __repr__(self) -> str:
        return f"Model({str(self.directory)!r})"

    @overload
    def generate(self, prompt: str, **settings: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **settings: Any) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str], **settings: Any) -> str | list[str]:
        """The continuation of a prompt, or those of several, which are written together.

        Args:
            prompt: a text, or a list of texts.
            settings: fields of `SamplingParams`.

        Raises:
            BadInput: a setting is unknown or wrong, or a prompt is empty or too long.

        Examples:
            >>> import smolforge
            >>> model = smolforge.load("runs/pocket")
            >>> text = model.generate("Once upon a time", max_tokens=20, seed=7)
            >>> texts = model.generate(["One", "Two"], max_tokens=5, seed=7)
            >>> len(texts)
            2
        """
        params = self._params(settings)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not all(isinstance(each, str) for each in prompts):
            raise BadInput("must be a text or a list of texts", field="prompt", hint="`engine` takes token ids.")
        texts = [""] * len(prompts)
        for output in self.engine.stream(prompts, params):
            if output.index == 0:
                texts[output.request] += output.text
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """The continuation of a prompt as it is written, some characters at a time.

        Raises:
            BadInput: as of `generate`.

        Examples:
            >>> import smolforge
            >>> model = smolforge.load("runs/pocket")
            >>> "".join(model.stream("Once", max_tokens=5, seed=7)) == model.generate("Once", max_tokens=5, seed=7)
            True
        """
        if not isinstance(prompt, str):
            raise BadInput("must be one text", field="prompt", hint="`generate` takes several.")
        outputs = self.engine.stream([prompt], self._params({**settings, "n": 1}))
        return (output.text for output in outputs if output.text)

    def chat(self, messages: str | Messages, **settings: Any) -> str:
        """The answer to a conversation. A setting that is not given is as of `smolforge chat`.

        Args:
            messages: a question, or messages such as {"role": "user", "content": "Hello?"}.

        Raises:
            BadInput: the model has no chat template, or the template refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            raise BadInput(
                "the model has no chat template: it was not trained for conversations", field="model",
                hint="`generate` continues text with it; `smolforge finetune` trains one that answers.",
            )  # fmt: skip
        turns: Messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        prompt = self.tokenizer.encode_chat([dict(turn) for turn in turns])
        return self.engine.generate(prompt, self._params({**CHAT_SAMPLING, **self.engine.defaults, **settings}))

    def score(self, text: str | Sequence[str]) -> Score:
        """How well the model predicts a text, or several: loss in nats per token, perplexity, bits per byte.

        Raises:
            DataError: there is no text.

        Examples:
            >>> import smolforge
            >>> model = smolforge.load("runs/pocket")
            >>> model.score("Once upon a time, there was a fox.").bits_per_byte > 0
            True
        """
        from smolforge.evaluation import evaluate_runner, tokenize_eval_set

        piece = tokenize_eval_set([text] if isinstance(text, str) else text, self.tokenizer)
        return evaluate_runner(self.engine.runner, piece, length=min(len(piece.tokens) - 1, self.engine.context))

    def _params(self, settings: Mapping[str, Any]) -> SamplingParams:
        from smolforge.generation import SamplingParams

        known = [field.name for field in dataclasses.fields(SamplingParams)]
        for name in settings:
            if name not in known:
                raise unknown("setting", name, known)
        return self.engine.params(**settings)


def load(
    model: str | Path, *, quantize: str = "auto", device: str = "auto", draft: str | Path | None = None
) -> Model:  # fmt: skip
    """A model, ready to generate.

    Args:
        model: a run, a checkpoint, a model directory, a .gguf file or a Hub id.
        quantize: fp32, bf16, int8, int4, "auto", or "none" for the precision of the file.
        device: cpu, cuda, cuda:N or "auto".
        draft: a smaller model with the same tokenizer for speculative decoding.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        BadInput: there is no such precision or device.
    """
    from smolforge.generation import Engine

    return Model(Engine.from_pretrained(model, quantize=quantize, device=device, draft=draft))


def evaluate(
    model: str | Path, data: str | Sequence[str] | Mapping[str, float], *, tokens: int = 100_000,
    length: int | None = None, held_out: bool = False, text_column: str | None = None,
) -> Score:  # fmt: skip
    """The score of a model on sources of text, in the precision of its file.

    Args:
        model: as of `load`.
        data: a source, several, or {source: weight}.
        tokens: maximum number of tokens to score.
        length: context in tokens; the model's, at most 2,048, unless given.
        held_out: only the documents that training never sees, by the settings of the model's run.
        text_column: "text" unless given, or that of the run where `held_out` is by it.

    Raises:
        DataError: a source is missing or has no text.
        BadInput: the model has no context of that length.

    Examples:
        >>> import smolforge
        >>> smolforge.evaluate("runs/pocket", "tales", tokens=2_000).bits_per_byte > 0
        True
    """
    from smolforge.checkpoint.locate import load_model, run_of
    from smolforge.evaluation.loss import held_out_by, score_sources

    module, tokenizer, directory = load_model(model)
    sources = dict(data) if isinstance(data, Mapping) else dict.fromkeys([data] if isinstance(data, str) else data, 1.0)
    return score_sources(
        module, tokenizer, sources, tokens=tokens, length=length, held_out=held_out,
        trained=held_out_by(run_of(directory)) if held_out else None, text_column=text_column,
    ).score  # fmt: skip
