"""Write a Hugging Face Space: a directory with a Gradio app over one model.

    OUT/README.md          the front matter that the Hub reads, and how to run the app elsewhere
    OUT/app.py             the app: prompt, length, temperature, top-p, top-k, examples
    OUT/requirements.txt   what smolforge depends on, as its own metadata says, and Gradio
    OUT/model/             the model directory, without training state
    OUT/smolforge/         this package, so that the Space runs the version that the model was tried with

`python app.py` runs it on any machine. The package is copied as source because the Hub installs requirements before it
copies the files, so a wheel in the directory could not be installed.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib import metadata, resources
from pathlib import Path

import jinja2
import yaml

from smolforge.checkpoint.format import read_config
from smolforge.checkpoint.locate import resolve_model
from smolforge.config import THREE_PROMPTS
from smolforge.errors import BadInput
from smolforge.export.push import card_license, copy_model, new_directory
from smolforge.model.summary import count_parameters

TEMPLATES = ("app.py", "README.md", "gitattributes")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The version that tests/export/test_space.py runs the app with; the Hub installs the one that the front matter names.
GRADIO = "6.31.0"


def export_space(model: str | Path, out: Path, *, title: str | None = None) -> Path:
    """Write a Space for `model`; an export that fails leaves nothing.

    Args:
        model: anything that `checkpoint.locate.resolve_model` takes.
        out: a directory that does not exist or is empty.
        title: name of the Space; that of the model's directory or Hub id unless given.

    Raises:
        BadInput: `out` exists already.
        CheckpointError: the model cannot be used.
        RunFailed: no room on the disk.
    """
    out, directory = Path(out), resolve_model(model)
    title = title or name_of(model)
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    values = {
        "title": title,
        "quoted_title": json.dumps(title),  # a string of JSON is one of Python too
        "examples": json.dumps(list(THREE_PROMPTS)),
        "front": front_matter(title, directory),
        "gradio": GRADIO,
        "parameters": f"{count_parameters(read_config(directory)):,}",
    }
    with new_directory(out, needed=weights) as temporary:
        copy_model(directory, temporary / "model")
        package = Path(str(resources.files("smolforge")))
        shutil.copytree(package, temporary / "smolforge", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        (temporary / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        for name in TEMPLATES:
            template = resources.files("smolforge.export") / "templates" / f"{name}.txt"
            text = template.read_text(encoding="utf-8")
            filled = jinja2.Template(text, keep_trailing_newline=True).render(values)
            (temporary / ("." + name if name == "gitattributes" else name)).write_text(filled, encoding="utf-8")
    return out


def name_of(model: str | Path) -> str:
    """The short name of a model: of its run, its directory, or the last part of its Hub id."""
    path = Path(model).expanduser()
    if not path.exists():
        return str(model).partition("@")[0].rpartition("/")[2]
    path = path.resolve()
    run = path.parent.name == "checkpoints" and path.parent.parent.name
    return f"{run} {path.name}" if run else path.name


def front_matter(title: str, directory: Path) -> str:
    """What the settings of the Space say of this model, as YAML; the template has those of all Spaces."""
    license = card_license(directory)
    front = {"title": title} | ({"license": license} if license else {})
    return yaml.safe_dump(front, allow_unicode=True).strip()


def requirements() -> list[str]:
    """The lines of requirements.txt: the dependencies of this package and Gradio, with torch from its CPU index."""
    try:
        found = metadata.requires("smolforge") or []
    except metadata.PackageNotFoundError:
        problem = "smolforge is not installed as a package, so its dependencies are not known"
        raise BadInput(problem, field="to", hint="Install it (pip install .) and export again.") from None
    needed = [entry.strip() for entry in found if not re.search(r";.*\bextra\s*==", entry)]
    why = "# A Space has no GPU unless one is rented: without this line torch brings gigabytes of CUDA."
    return [why, f"--extra-index-url {CPU_INDEX}", *needed, f"gradio=={GRADIO}"]
