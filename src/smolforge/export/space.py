"""A Hugging Face Space: a directory that serves the page of `smolforge serve` over one model.

    OUT/README.md          the front matter that the Hub reads, and what this is
    OUT/app.py             starts the server; OMP_WAIT_POLICY=PASSIVE before torch is imported
    OUT/requirements.txt   what smolforge needs for serving, as its own metadata says
    OUT/model/             the model directory, without training state
    OUT/smolforge/         this package, so that the Space runs what the model was tried with

It runs locally as it is: `python app.py`. The package travels as source because the Hub installs requirements before
it copies the files, so a wheel beside them could not be installed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import yaml

from smolforge.checkpoint.card import count_parameters
from smolforge.checkpoint.format import CARD, read_config
from smolforge.checkpoint.locate import resolve_model
from smolforge.errors import BadInput
from smolforge.export.plain import copy_model, fresh_directory

TEMPLATES = ("app.py", "README.md", "gitattributes")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_NAME = re.compile(r"^[\w.-]+")


def export_space(
    model: str | Path, out: Path, *, title: str | None = None, say: Callable[[str], None] = lambda text: None
) -> Path:
    """Write a Space that serves `model`; whole or not at all.

    Args:
        model: anything that `checkpoint.locate.resolve_model` takes.
        out: a directory that does not exist or is empty.
        title: name of the Space; that of the model's directory or Hub id unless given.

    Raises:
        BadInput: `out` is there already.
        CheckpointError: the model cannot be used.
        RunFailed: no room on the disk.
    """
    out, directory = Path(out), resolve_model(model)
    title = title or name_of(model)
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    with fresh_directory(out, needed=weights) as beside:
        copy_model(directory, beside / "model")
        package = Path(str(resources.files("smolforge")))
        shutil.copytree(package, beside / "smolforge", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        (beside / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        values = {
            "title": title,
            "quoted title": json.dumps(title),  # of JSON's strings, all are Python's too
            "front": front_matter(title, directory),
            "parameters": f"{count_parameters(read_config(directory)):,}",
        }
        for name in TEMPLATES:
            text = _template(name)
            for key, value in values.items():
                text = text.replace("{{ " + key + " }}", value)
            (beside / ("." + name if name == "gitattributes" else name)).write_text(text, encoding="utf-8")
    return out


def name_of(model: str | Path) -> str:
    """What a person calls a model: its run, its directory, or the last part of its Hub id."""
    path = Path(model).expanduser()
    if not path.exists():
        return str(model).partition("@")[0].rpartition("/")[2]
    path = path.resolve()
    below = path.parent.name == "checkpoints" and path.parent.parent.name
    return f"{below} {path.name}" if below else path.name


def front_matter(title: str, directory: Path) -> str:
    """What the Hub reads of a Space, as YAML."""
    front: dict[str, Any] = {
        "title": title,
        "emoji": "🔥",
        "colorFrom": "yellow",
        "colorTo": "red",
        "sdk": "gradio",
        "sdk_version": _version("gradio"),
        "python_version": "3.12",
        "app_file": "app.py",
        "pinned": False,
        "short_description": "A small language model, served by smolforge",
    }
    license = card_license(directory)
    if license:
        front["license"] = license
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()


def card_license(directory: Path) -> str | None:
    """The license that a model's card names, or None where it names none."""
    card = directory / CARD
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) and found != "unknown" else None


def requirements() -> list[str]:
    """The lines of requirements.txt: what the package needs with the extra `web`, torch from its CPU index.

    Raises:
        BadInput: the package is not installed, so nothing says what it needs.
    """
    try:
        found = metadata.requires("smolforge") or []
    except metadata.PackageNotFoundError:
        raise BadInput(
            "smolforge is not installed as a package, so what it needs is not known",
            field="to",
            hint="Install it (pip install .) and export again.",
        ) from None
    lines = ["# A Space has no GPU unless one is rented: without this line torch brings gigabytes of CUDA."]
    lines.append(f"--extra-index-url {CPU_INDEX}")
    return [*lines, *_needed(found)]


def _needed(entries: list[str]) -> Iterator[str]:
    for entry in entries:
        requirement, _, marker = entry.partition(";")
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", marker)
        if extra is None or extra[1] == "web":
            name = _NAME.match(requirement.strip())
            # The Hub installs the Gradio of sdk_version; another one here would be a conflict.
            yield f"gradio=={_version('gradio')}" if name and name[0] == "gradio" else requirement.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise BadInput(
            f"the package {package} is not installed", field="to", hint="Install it with: pip install 'smolforge[web]'"
        ) from None


def _template(name: str) -> str:
    return (resources.files("smolforge.export") / "templates" / f"{name}.txt").read_text(encoding="utf-8")
