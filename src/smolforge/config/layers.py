"""A configuration from its layers, later ones winning: the defaults, a preset or a YAML file, and `--set key=value`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ByteSize, ValidationError
from pydantic_core import to_jsonable_python

from smolforge.config.sections import RunConfig
from smolforge.errors import BadInput, ConfigError, WrongValue, nearest, unknown, wrong_values


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("smolforge") / "presets"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The keys that a preset sets; BadInput, naming the nearest, where there is none of this name."""
    if name not in preset_names():
        raise unknown("preset", name, preset_names())
    return yaml.safe_load(_preset_text(name))


def preset_about(name: str) -> str:
    """The first line of a preset, which says what it is."""
    return _preset_text(name).partition("\n")[0].strip("# .")


def _preset_text(name: str) -> str:
    return (resources.files("smolforge") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def read_file(path: Path) -> dict[str, Any]:
    """The keys that a YAML file sets; BadInput where it is missing, not valid YAML, or does not hold a mapping."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"no such configuration file: {path}") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold a mapping of keys such as model: and data:")
    return value


def build_config(base: str | None = None, overrides: list[str] | None = None, **layers: Any) -> RunConfig:
    """A validated configuration from a preset or YAML file and `key=value` overrides.

    Args:
        base: name of a preset or path of a YAML file; nothing but the defaults where None.
        overrides: `section.key=value`, the value in YAML.
        layers: sections that win over everything, such as `data={"sources": {...}}`.

    Raises:
        BadInput: the base cannot be read.
        ConfigError: one or several keys or values are wrong.
    """
    tree = {} if base is None else _read_base(base)
    problems: list[BadInput] = []
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(BadInput(f"{override!r} has no '='", field="--set", hint="Write --set section.key=value."))
            continue
        try:
            layer: Any = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: what looks like a date and is none
            layer = text
        merge_key(tree, key.strip(), layer)
    merge(tree, layers)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        errors = [e for e in error.errors() if e["type"] != _NOT_DERIVED]
        raise ConfigError([*problems, *map(_explain, wrong_values(errors, tree))]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _read_base(base: str) -> dict[str, Any]:
    """The keys of a preset, or of a file over those of the preset that it names."""
    if not (base.endswith((".yaml", ".yml")) or "/" in base):
        return {"preset": base, **read_preset(base)}
    path = Path(base)
    found = read_file(path)
    is_whole = found.keys() >= RunConfig.model_fields.keys()  # as the configuration of a run is
    if is_whole and path.name == "config.yaml":
        return found
    tree = {} if is_whole or found.get("preset") is None else read_preset(str(found["preset"]))
    merge(tree, found)
    return {**tree, "preset": path.stem}


# What pydantic says of a default that it could not derive, because the key it derives from is wrong and reported too.
_NOT_DERIVED = "default_factory_not_called"
# Choosing one of these keys drops what an earlier layer chose under another name.
_LENGTHS = {"steps", "tokens", "epochs"}
# These mappings are values of their own: a later layer replaces them whole.
_WHOLE = {"sources", "groups"}


def merge_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Lay the value of one key, such as `optimizer.lr`, over `tree` in place; the key may also be a whole section."""
    for part in reversed(key.split(".")):
        value = {part: value}
    merge(tree, value)


def merge(tree: dict[str, Any], layer: dict[str, Any]) -> None:
    """Lay `layer` over `tree`, section by section, in place."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and key not in _WHOLE:
            merge(tree[key], value)
        else:
            if value is not None and key in _LENGTHS:
                for other in _LENGTHS - {key}:
                    tree.pop(other, None)
            tree[key] = value


def _explain(wrong: WrongValue) -> BadInput:
    """What pydantic says of one wrong key or value, in our words, with the nearest right key."""
    path, error = list(wrong.path), wrong.error
    field = ".".join(path) or None
    kind = error["type"]
    if kind == "extra_forbidden":
        known, places = _keys_at(path[:-1]), [place for place, _ in _leaves() if "." in place]
        elsewhere = next((place for place in places if place.endswith(f".{path[-1]}")), None)  # lr → optimizer.lr
        guess = elsewhere or nearest(path[-1], known) or nearest(path[-1], places)
        hint = f"Did you mean {guess!r}? " if guess else ""
        return BadInput("unknown key", field=field, hint=f"{hint}Known here: {', '.join(known)}.")
    if kind == "value_error":
        text = str(error.get("ctx", {})["error"])
        inner, colon, rest = text.partition(": ")
        if colon and re.fullmatch(r"[\w.]+", inner):
            return BadInput(rest, field=f"{field}.{inner}" if field else inner)
        return BadInput(text, field=field)
    if kind.startswith("byte_size"):
        return BadInput(f"{error['input']!r} is not an amount of memory; write it as 6GB or 512MiB", field=field)
    glued = re.fullmatch(r"(.+):([\d.][\w.+-]*)", path[-1]) if path and error["input"] is None else None
    if glued:  # which YAML reads as one key; a URL's colon is not followed by a number alone
        written = f"{{{glued[1]}: {glued[2]}}}"
        return BadInput("no value", field=field, hint=f"Write {written}, with a space after the colon.")
    given = "" if isinstance(error["input"], dict) else f", not {error['input']!r}"
    return BadInput(wrong.message + given, field=field, hint=_example(path))


def _example(path: list[str]) -> str | None:
    """The values that the list or mapping at `path` takes, with its default as it is written."""
    key = ".".join(path[:2])
    field = dict(_leaves()).get(key)
    if field is None or get_origin(field.annotation) not in (list, tuple, dict):
        return None
    default = field.get_default(call_default_factory=True)
    return f"{key} takes {_allowed(field.annotation)}{f', as in {key}={_written(default)}' if default else ''}."


def _written(value: Any) -> str:
    """`value` as a YAML file and `--set` take it, on one line."""
    style: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": 1e9}
    return yaml.safe_dump(to_jsonable_python(value), **style).removesuffix("...\n").strip()


def _keys_at(path: list[str]) -> list[str]:
    section: Any = RunConfig
    for key in path:
        field = section.model_fields.get(key) if _is_section(section) else None
        options = [field.annotation, *get_args(field.annotation)] if field else []
        section = next((option for option in options if _is_section(option)), None)
    return sorted(section.model_fields) if _is_section(section) else []


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


class KeyRecord(NamedTuple):
    """A key of a configuration: the values it takes, its default (None where it is derived or open), its meaning."""

    key: str
    allowed: str
    default: str | None
    meaning: str


def key_records() -> list[KeyRecord]:
    """All keys, in the order of the sections."""
    return [_record(key, field) for key, field in _leaves()]


def key_table() -> str:
    """All keys with their defaults and meanings, as the Markdown tables of docs/configuration.md."""
    head = ["| key | default | meaning |", "|---|---|---|"]
    rows = (f"| `{r.key}` | {'' if r.default is None else f'`{r.default}`'} | {r.meaning} |" for r in key_records())
    return "\n".join([*head, *rows])


def _leaves() -> Iterator[tuple[str, Any]]:
    """Each key, dotted, with pydantic's description of it."""
    for name, field in RunConfig.model_fields.items():
        kind: Any = field.annotation
        if _is_section(kind):
            yield from ((f"{name}.{inner}", leaf) for inner, leaf in kind.model_fields.items())
        else:
            yield name, field


def _record(key: str, field: Any) -> KeyRecord:
    derived = field.default_factory_takes_validated_data  # from other keys: its meaning says how
    default = None if derived else field.get_default(call_default_factory=True)
    meaning = " ".join((field.description or "").split())
    return KeyRecord(key, _allowed(field.annotation), None if default is None else _written(default), meaning)


_KINDS = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null",
    ByteSize: "memory",
}  # fmt: skip


def _allowed(kind: Any) -> str:
    """The values of a type, for people."""
    inner, origin = get_args(kind), get_origin(kind)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin is Annotated:
        return _allowed(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(_allowed(option) for option in inner)
    if origin is list or origin is tuple:
        return f"a list of: {_allowed(inner[0])}"
    return _KINDS.get(kind, "a mapping")
