"""The tokens of one choice with their log-probabilities, in step with the text that is shown.

Text may lag behind tokens (half characters, possible stop strings). A token is reported with the first text of
it, and a token that only belongs to a stop string, or ends the text, is never reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolforge.generation.sequence import StepOutput
    from smolforge.tokenizer import Tokenizer

# JSON has no minus infinity; OpenAI's own clients meet -9999.0 for "practically never".
LEAST_LOGPROB = -9999.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One token: where its text begins in what is shown, and what the model thought of it."""

    token_id: int
    offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Transcript:
    """Follows one choice.

    Attributes:
        text: all that was shown.
        finish_reason: set at the end.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._in_prompt = True
        self._decoded = 0
        self._held: list[Entry] = []
        self._shown = 0
        self.parts: list[str] = []
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self.parts)

    def push(self, step: StepOutput) -> list[Entry]:
        """Take a step; the tokens that may be reported now."""
        if self._in_prompt and not step.prompt:
            self._in_prompt = False
            self._decoded += len(self._decoder.flush())
            self._decoder = self._tokenizer.stream()
        if step.token_id is not None:
            self._held.append(Entry(step.token_id, self._decoded, step.logprob, step.top_logprobs))
            self._decoded += len(self._decoder.push(step.token_id))
        self.parts.append(step.text)
        self._shown += len(step.text)
        self.finish_reason = step.finish_reason
        if step.finish_reason == "length":
            ready, self._held = self._held, []
        else:
            ready = [entry for entry in self._held if entry.offset < self._shown]
            self._held = self._held[len(ready) :] if step.finish_reason is None else []
        return ready


def token_string(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as OpenAI spells it: its text, or `bytes:\\xe2\\x9c` where its bytes are no text of their own."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _plain(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[Entry]) -> dict[str, Any]:
    """`logprobs` of /v1/completions. `top_logprobs` always has the token itself, so up to one more than asked."""
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.logprob is None:
            tops.append(None)
            continue
        top = {token_string(tokenizer, token_id): _plain(logprob) for token_id, logprob in reversed(entry.top)}
        top.setdefault(token_string(tokenizer, entry.token_id), _plain(entry.logprob))
        tops.append(dict(sorted(top.items(), key=lambda item: -item[1])))
    return {
        "tokens": [token_string(tokenizer, entry.token_id) for entry in entries],
        "token_logprobs": [None if entry.logprob is None else _plain(entry.logprob) for entry in entries],
        "top_logprobs": tops,
        "text_offset": [entry.offset for entry in entries],
    }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[Entry]) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""

    def describe(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": token_string(tokenizer, token_id), "logprob": _plain(logprob), "bytes": list(data)}

    content = [
        {
            **describe(entry.token_id, entry.logprob or 0.0),
            "top_logprobs": [describe(token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}
