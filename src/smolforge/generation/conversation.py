"""A conversation with a model that has a chat template: turns, the next answer, and what undoes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from smolforge.errors import BadInput
from smolforge.generation.engine import Engine
from smolforge.generation.sampling_params import SamplingParams
from smolforge.generation.sequence import FinishReason


@dataclasses.dataclass
class Answer:
    """What is known of an answer when it has ended; a stopped one has no reason."""

    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    finish_reason: FinishReason | None = None


class Conversation:
    """Turns of a user and a model. The engine keeps what it has computed of them, so only new turns are run.

    `system` is the first message, the template's own where None. Raises BadInput for a model without a chat template.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None) -> None:
        if engine.tokenizer.chat_template is None:
            raise BadInput(
                "the model has no chat template: it was not trained for conversations", field="model",
                hint="`smolforge generate` continues text with it; `smolforge chat smollm2` talks to one that was.",
            )  # fmt: skip
        self.engine, self.params = engine, params
        self.answer = Answer()  # the last one
        self.messages: list[dict[str, str]] = []  # all turns, the system's first, as the chat template takes them
        if system is not None:
            self.set_system(system)

    def set_system(self, text: str) -> None:
        """Replace the system's message; it counts from the next answer on. An empty one removes it."""
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def ask(self, question: str) -> Iterator[str]:
        """The answer's text as it is written. What was written stays in the conversation when the caller stops.

        Raises:
            BadInput: the conversation does not fit the context, or the template refuses it; it is as before then.
        """
        return self._reply([*self.messages, {"role": "user", "content": question}])

    def _reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """Answer the question that these messages end with; they are the conversation from the first token on."""
        prompt = self.engine.tokenizer.encode_chat(messages)
        answer = Answer(prompt_tokens=len(prompt))
        outputs = self.engine.stream([prompt], self.params)
        first = next(outputs)  # raises before anything changes
        self.messages, self.answer = messages, answer
        try:
            while True:
                answer.text += first.text
                answer.tokens += first.token_id is not None
                answer.finish_reason = first.finish_reason
                if first.text:
                    yield first.text
                if (first := next(outputs, None)) is None:
                    return
        finally:
            outputs.close()  # type: ignore[attr-defined]
            self.messages.append({"role": "assistant", "content": answer.text})

    def undo(self) -> str:
        """Take back the last question and its answer; the question. BadInput where nothing was asked yet."""
        last = self._last_question()
        question = self.messages[last]["content"]
        del self.messages[last:]
        return question

    def retry(self) -> Iterator[str]:
        """Answer the last question again; with a seed, by the next one, since the same would answer the same."""
        messages = self.messages[: self._last_question() + 1]
        if self.params.seed is not None:
            self.params = dataclasses.replace(self.params, seed=self.params.seed + 1)
        return self._reply(messages)

    def _last_question(self) -> int:
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise BadInput("nothing was asked yet")
        return asked[-1]
