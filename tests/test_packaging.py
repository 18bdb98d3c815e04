"""What surrounds the package: sdist and wheel, the Dockerfile, llms.txt."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_sdist_and_wheel_are_whole_and_twine_accepts_them(tmp_path: Path) -> None:
    build = shutil.which("git") and subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if not build or build.returncode:
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    for name in build.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    tools = tmp_path / "tools"
    subprocess.run([sys.executable, "-m", "venv", tools], check=True)
    pip = [str(tools / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "build", "twine", "hatchling"]).returncode:
        pytest.skip("the package index does not answer")
    python, dist = str(tools / "bin" / "python"), tmp_path / "dist"
    subprocess.run(
        [python, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)], check=True, capture_output=True
    )
    checked = subprocess.run(
        [python, "-m", "twine", "check", "--strict", *dist.iterdir()], capture_output=True, text=True
    )
    assert not checked.returncode and checked.stdout.count("PASSED") == 2, checked.stdout
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/smolforge/py.typed", "tests/conftest.py"} <= names
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        inside = set(archive.namelist())
    kept = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "smolforge").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and "prebuilt" not in path.parts}  # fmt: skip
    assert kept <= inside, kept - inside


def test_the_dockerfile_copies_what_exists_and_installs_known_extras() -> None:
    text = (ROOT / "Dockerfile").read_text()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [name for line in re.findall(r"^COPY (.*) \./?\S*$", text, re.MULTILINE) for name in line.split()]
    assert copied and sorted(copied) == sorted(allowed) and all((ROOT / name).exists() for name in copied)
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r'"\.\[(.*?)\]"', text)[0].split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    assert re.search(r"^ARG PYTHON=3\.1[0-3]$", text, re.MULTILINE), "a version that pyproject.toml promises"


def test_what_llms_txt_names_exists() -> None:
    text = (ROOT / "llms.txt").read_text()
    assert text.startswith("# smolforge\n\n> ")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / target).exists(), target
