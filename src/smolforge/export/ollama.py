"""Write a directory that `ollama create` takes: the model as GGUF, and a Modelfile with its chat template.

Ollama has a template language of its own (Go's) and does not read the Jinja template of the file; without a Modelfile a
chat model answers as if it continued text. The words around each role are found by filling the Jinja template with
marks. Filling them in again must give what the Jinja template gives for several conversations, else the export is
refused.

Format: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smolforge.checkpoint.format import read_generation_defaults
from smolforge.checkpoint.locate import resolve_model
from smolforge.errors import BadInput
from smolforge.export.gguf import Exported, export_gguf
from smolforge.export.push import new_directory
from smolforge.gguf_file import end_ids, open_gguf
from smolforge.tokenizer import Tokenizer

_SYSTEM, _USER, _ANSWER, _LAST = "qSYSTEMq", "qUSERq", "qANSWERq", "qLASTq"
_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}


@dataclass(frozen=True)
class RoleTemplate:
    """A chat template as words around the text of each role."""

    around: dict[str, tuple[str, str]]  # what stands before and after a text, by role
    opening: str  # what stands before the answer to be written
    system: str = ""  # the system message of a conversation that has none

    def fill(self, messages: list[tuple[str, str]]) -> str:
        """The text of a conversation, (role, text) each, up to the answer to be written."""
        if self.system and messages[0][0] != "system":
            messages = [("system", self.system), *messages]
        return "".join(self.around[role][0] + text + self.around[role][1] for role, text in messages) + self.opening

    def go(self) -> str:
        """The same in Go's template language."""
        roles = self.around.items()
        cases = (f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, (before, after) in roles)
        return "{{ range .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}" + self.opening


def role_template(tokenizer: Tokenizer) -> RoleTemplate:
    """The chat template of a tokenizer as words around roles; BadInput where there is none, or it has another form."""
    bos = tokenizer.token_text(tokenizer.bos_id)
    # Ollama begins a text with the first token by itself, as the file says.
    adds_bos = tokenizer.backend.encode("x").ids[:1] == [tokenizer.bos_id]

    def render(messages: list[tuple[str, str]]) -> str:
        ids = tokenizer.encode_chat([{"role": role, "content": text} for role, text in messages])
        text = tokenizer.decode(ids, skip_special_tokens=False)
        return text.removeprefix(bos) if adds_bos else text

    refusal = BadInput(
        "the chat template is not words around each message", field="model", hint="Export --to gguf instead."
    )
    turns = [("user", _USER), ("assistant", _ANSWER), ("user", _LAST)]
    try:
        plain, whole = render(turns), render([("system", _SYSTEM), *turns])
        marks = "|".join((_SYSTEM, _USER, _ANSWER, _LAST))
        before_system, after_system, between, after_answer, end = re.split(marks, whole)
    except ValueError:
        raise refusal from None
    # A text ends with a special token and line breaks, if with anything; the rest belongs to what follows.
    specials = "|".join(re.escape(tokenizer.token_text(i)) for i in sorted(tokenizer.special_ids))
    closing = re.compile(rf"(?:(?:{specials})\n*|\n+)?")

    def cut(words: str) -> tuple[str, str]:
        at = closing.match(words).end()  # type: ignore[union-attr]
        return words[:at], words[at:]

    (system_end, user_begin), (user_end, answer_begin), (answer_end, _), (_, opening) = map(
        cut, (after_system, between, after_answer, end)
    )
    head = plain.partition(_USER)[0]
    default = head.removeprefix(before_system).removesuffix(after_system) if len(head) > len(after_system) else ""
    around = {"system": (before_system, system_end), "user": (user_begin, user_end)}
    found = RoleTemplate({**around, "assistant": (answer_begin, answer_end)}, opening, default)
    words = [*itertools.chain(*found.around.values()), opening]
    conversations = [turns[:1], turns, [*turns, ("assistant", "Ja."), ("user", "Und?")]]
    conversations += [[("system", "Be kind."), *conversation] for conversation in conversations]
    if any("{{" in word or '"""' in word for word in words) or any(found.fill(c) != render(c) for c in conversations):
        raise refusal
    return found


def export_ollama(
    model: str | Path, out: Path, *, kind: str = "q8_0", name: str | None = None,
    calibration: Mapping[str, float] | None = None,
) -> Exported:  # fmt: skip
    """Write `out`/model.gguf, whose options `export_gguf` has, and `out`/Modelfile.

    Raises:
        BadInput, RunFailed: as `export_gguf`, `role_template` and `new_directory`.
    """
    directory = resolve_model(model)
    tokenizer, defaults = Tokenizer.from_pretrained(directory), read_generation_defaults(directory)
    template = role_template(tokenizer)
    with new_directory(Path(out), needed=0) as place:
        done = export_gguf(
            directory, place / "model.gguf", kind=kind, name=name or Path(out).name, calibration=calibration
        )
        ends = dict.fromkeys([tokenizer.eos_id, *end_ids(open_gguf(done.path).metadata)])
        lines = ["FROM ./model.gguf", f'TEMPLATE """{template.go()}"""']
        lines += [f'SYSTEM """{template.system}"""'] if template.system else []
        lines += [f'PARAMETER stop "{tokenizer.token_text(i)}"' for i in ends]
        lines += [f"PARAMETER {theirs} {defaults[ours]}" for ours, theirs in _PARAMETERS.items() if ours in defaults]
        (place / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Exported(Path(out), done.bytes, kind, done.tensors)
