"""From a row to a conversation, whatever form of chat data it has; the columns tell which.

    messages                            role and content of each, as OpenAI and TRL have them
    conversations                       the same, or from and value (ShareGPT)
    prompt + completion                 texts, or lists of messages; also response, question + answer, q + a
    instruction (+ input) + output      Alpaca; also context and response (Dolly)
    (prompt +) chosen + rejected        preferences, of which the chosen answer is read

A conversation is kept as JSON with sorted keys: equal conversations are equal texts, whatever file they came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from smolforge.data.readers import BadRow
from smolforge.formatting import replace_lone_surrogates

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool",
}  # fmt: skip
# Columns of a question and its answer; the first may have an input that follows it.
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"), ("q", "a"),
)  # fmt: skip
INPUTS = ("input", "context")
PREFERENCES = ("chosen", "rejected")
FORMS = (
    "Known forms: messages, conversations, prompt + completion, instruction + output, question + answer, "
    "chosen + rejected."
)


def conversation_text(row: Mapping[str, Any], *, pair: bool = False) -> str:
    """The conversation in a row, as JSON: {"messages": [...]}, and "tools" where it has some.

    Args:
        pair: read a pair of answers: "messages" is the conversation with the chosen one, "rejected" with the other.

    Raises:
        BadRow: the row has no known form, more than one, or is broken; the error does not say where the row is.
    """
    if pair and any(row.get(name) is None for name in PREFERENCES):
        names = ", ".join(map(repr, list(row)[:20])) or "nothing"
        hint = "It needs the columns chosen and rejected, and prompt where they do not begin with it."
        raise BadRow(f"is not a pair of answers: it has {names}", field="data.sources", hint=hint)
    found: dict[str, Any] = {"messages": _alternative(row, "chosen") if pair else _messages(row)}
    if pair:
        found["rejected"] = _alternative(row, "rejected")
        if found["rejected"] == found["messages"]:
            raise BadRow("has the same answer as chosen and as rejected")
        if found["rejected"][0] != found["messages"][0]:
            raise BadRow("has no question that both answers have", hint="Put it into the column prompt.")
    for messages in (found["messages"], found.get("rejected", found["messages"])):
        if messages[-1]["role"] != "assistant" if pair else all(m["role"] != "assistant" for m in messages):
            raise BadRow("has no message of the assistant to learn from")
    if row.get("tools"):
        found["tools"] = _parsed(row["tools"], "tools") if isinstance(row["tools"], str) else row["tools"]
    return replace_lone_surrogates(json.dumps(found, ensure_ascii=False, sort_keys=True))


def has_conversation(row: Mapping[str, Any]) -> bool:
    """Whether the columns of a row are those of chat data."""
    return bool(_forms(row))


def _forms(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    forms: list[tuple[str, ...]] = [(name,) for name in ("messages", "conversations") if row.get(name) is not None]
    forms += [pair for pair in PAIRS if all(row.get(name) is not None for name in pair)]
    # Collections of preferences often have the chosen conversation as messages too.
    return forms or [form for form in [PREFERENCES] if all(row.get(name) is not None for name in form)]


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    forms = _forms(row)
    if not forms:
        names = ", ".join(map(repr, list(row)[:20])) or "nothing"
        raise BadRow(f"is not a conversation: it has {names}", field="data.sources", hint=FORMS)
    if len(forms) > 1:
        names = " and ".join("+".join(form) for form in forms)
        raise BadRow(f"could be read as {names}", field="data.sources", hint="Keep the columns of one form.")
    form = forms[0]
    if len(form) == 1:
        return _listed(row[form[0]], form[0])
    if form == PREFERENCES:
        return _alternative(row, "chosen")
    system = [_message("system", row["system"], "system")] if row.get("system") else []
    question, answer = form
    asked = row[question]
    extra = next((row[name] for name in INPUTS if question == "instruction" and row.get(name)), None)
    if extra is not None and isinstance(asked, str):
        asked = f"{asked}\n\n{extra}"
    return [*system, *_side(asked, "user", question), *_side(row[answer], "assistant", answer)]


def _alternative(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The conversation with the chosen or the rejected answer, which may be all of it or what follows the prompt."""
    found, prompt = _side(row[name], "assistant", name), row.get("prompt")
    if prompt is None or (len(found) > 1 and found[0]["role"] != "assistant"):
        return found
    system = [_message("system", row["system"], "system")] if row.get("system") else []
    return [*system, *_side(prompt, "user", "prompt"), *found]


def _side(value: Any, role: str, name: str) -> list[dict[str, Any]]:
    """One side of a pair: a text of this role, or messages."""
    return _listed(value, name) if isinstance(value, list) else [_message(role, value, name)]


def _parsed(text: str, name: str) -> Any:
    """The JSON in a column."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} is not valid JSON: {error}") from None


def _listed(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a column of a csv file
        value = _parsed(value, name)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} must be a list of messages, not {_kind(value)}")
    found = []
    for number, message in enumerate(value, 1):
        where = f"{name}, message {number}"
        if not isinstance(message, Mapping):
            raise BadRow(f"{where} must have role and content, and is {_kind(message)}")
        is_sharegpt = "from" in message and "role" not in message
        role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"{where} has the {role_key} {role!r}", hint=f"Known: {', '.join(ROLES)}.")
        others = {
            key: inner for key, inner in message.items()
            if key not in (role_key, content_key) and inner not in (None, [], "")
        }  # fmt: skip
        found.append(_message(ROLES[role], message.get(content_key), where, others))
    return found


def _message(role: str, content: Any, where: str, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    if isinstance(content, list):
        strange = [part for part in content if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))]
        if strange:
            kind = strange[0].get("type") if isinstance(strange[0], Mapping) else _kind(strange[0])
            raise BadRow(f"{where} has a part of type {kind}", hint="smolforge reads text alone.")
        content = "".join(part["text"] for part in content)
    if content is None and others and others.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"{where} has no text: its content is {_kind(content)}")
    if role == "assistant" and not content.strip() and not (others and others.get("tool_calls")):
        raise BadRow(f"{where} is empty, and there is nothing to learn from it")
    return {**(others or {}), "role": role, "content": content}


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__
