"""The directory for Ollama: its Modelfile, parsed and filled here, says what the chat template says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_llama import make_model

from smolforge import cli
from smolforge.checkpoint.format import write_model
from smolforge.errors import BadInput
from smolforge.export.gguf import export_gguf
from smolforge.export.ollama import export_ollama, role_template
from smolforge.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<repo_name>' + m['role'] + '<reponame>\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{{ '<repo_name>assistant<reponame>\n\n' }}"
)
ZEPHYR = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% if loop.last %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {"chatml": CHATML + OPENING, "smollm2": SMOLLM2 + OPENING, "llama3": LLAMA3, "zephyr": ZEPHYR}
MERGED = (  # the system's text inside the first question, as Mistral has it
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n' %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] {% if loop.first %}{{ first }}{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def make(place: Path, template: str, *, begins: bool = False) -> Tokenizer:
    from tokenizers import processors

    tokenizer = Tokenizer.train(["the cat sat on the mat user assistant system " * 20], 400)
    tokenizer.config |= {"chat_template": template, "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    if begins:
        tokenizer.backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.config)
    module = make_model()
    write_model(place, module.config, module.state_dict(), tokenizer)
    return tokenizer


def parse(path: Path) -> dict[str, Any]:
    """A Modelfile: instructions with values, quoted by one or three marks or not at all."""
    found: dict[str, Any] = {"PARAMETER": []}
    for name, quoted, plain in re.findall(
        r'^([A-Z]+) (?:"""(.*?)"""|(.*?))$', path.read_text(), re.MULTILINE | re.DOTALL
    ):
        if name == "PARAMETER":
            key, value = plain.split(" ", 1)
            found[name].append((key, value.strip('"')))
        else:
            found[name] = quoted or plain
    return found


def filled(go: str, messages: list[dict[str, str]]) -> str:
    """What Go's template says, of the few actions that are used."""
    body, tail = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", go, re.DOTALL).groups()  # type: ignore[union-attr]
    cases = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else|\Z)', body, re.DOTALL))
    return "".join(cases[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + tail


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_modelfile_says_what_the_template_says(name: str, tmp_path: Path) -> None:
    begins = name == "llama3"
    tokenizer = make(tmp_path / "m", TEMPLATES[name], begins=begins)
    done = export_ollama(tmp_path / "m", tmp_path / "cat", kind="f16")
    assert done.path == tmp_path / "cat" and sorted(p.name for p in done.path.iterdir()) == ["Modelfile", "model.gguf"]
    found = parse(tmp_path / "cat" / "Modelfile")
    assert found["FROM"] == "./model.gguf" and ("stop", "<|im_end|>") in found["PARAMETER"]
    assert found.get("SYSTEM") == ("You are kind." if name == "smollm2" else None)
    _fills_as_the_template(found, tokenizer, "<|endoftext|>" if begins else "")


def _fills_as_the_template(found: dict[str, Any], tokenizer: Tokenizer, begin: str = "") -> None:
    """Three conversations by a parsed Modelfile and by the chat template."""
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "A cat?"},
    ]
    for messages in (turns[:1], turns, [{"role": "system", "content": "Be brief."}, *turns]):
        text = tokenizer.decode(tokenizer.encode_chat(messages), skip_special_tokens=False)
        given = messages
        if "SYSTEM" in found and messages[0]["role"] != "system":  # Ollama puts it first where a request has none
            given = [{"role": "system", "content": found["SYSTEM"]}, *messages]
        assert begin + filled(found["TEMPLATE"], given) == text


@pytest.mark.parametrize("template", [MERGED, "{{ messages[-1].content | upper }}", "{{ messages | length }}"])
def test_a_template_of_another_form_is_refused(template: str, tmp_path: Path) -> None:
    make(tmp_path / "m", template)
    with pytest.raises(BadInput, match="chat template"):
        export_ollama(tmp_path / "m", tmp_path / "cat")
    assert not (tmp_path / "cat").exists()


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "m", TEMPLATES["chatml"])
    words = ["export", str(tmp_path / "m"), "--to", "ollama", "--out", str(tmp_path / "cat")]
    assert cli.run(words) == 0 and "ollama create cat -f" in capsys.readouterr().out
    assert cli.run(words) == 2 and "exists already" in capsys.readouterr().err
    assert cli.run([*words[:-1], str(tmp_path / "b"), "--title", "x"]) == 2


def test_a_gguf_file_keeps_what_ends_a_turn(tmp_path: Path) -> None:
    import json

    make(tmp_path / "m", TEMPLATES["chatml"])
    config = tmp_path / "m" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "<|endoftext|>"}))
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    fields = gguf.GGUFReader(export_gguf(tmp_path / "m", tmp_path / "m.gguf").path).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 2
    assert fields["tokenizer.chat_template"].contents() == TEMPLATES["chatml"]
    again = export_gguf(tmp_path / "m.gguf", tmp_path / "again.gguf").path
    fields = gguf.GGUFReader(again).fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 2 and fields["tokenizer.chat_template"].contents()


def test_the_genuine_model(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(smollm2)
    found = role_template(tokenizer)
    assert found.system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert found.opening == "<|im_start|>assistant\n" and found.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    modelfile = parse(export_ollama(smollm2, tmp_path / "smol", kind="q4_1").path / "Modelfile")
    assert modelfile["SYSTEM"] == found.system and ("stop", "<|im_end|>") in modelfile["PARAMETER"]
    _fills_as_the_template(modelfile, tokenizer)
