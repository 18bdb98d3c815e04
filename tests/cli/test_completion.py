"""smolforge completion: what a shell makes of the script."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from smolforge import cli
from smolforge.cli.completion import SHELLS

# What bash calls when Tab is pressed behind the words.
PRESS_TAB = """
source ./script
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"
_shtab_smolforge
echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("tra", "train"),
        ("train poc", "pocket"),
        ("train my_", "my_run.yaml"),
        ("train --minu", "--minutes"),
        ("serve --quantize int", "int8 int4"),
        ("eval runs/pocket --data my_", "my_run.yaml"),
        ("data wh", "which"),
        ("completion fi", "fish"),
    ],
)
def test_bash_completes(words: str, completed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which("bash"):
        pytest.skip("no bash")
    assert cli.run(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "my_run.yaml").touch()
    press = ["bash", "-c", PRESS_TAB, "bash", "smolforge", *words.split()]
    done = subprocess.run(press, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == completed


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script_with_all_verbs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in cli.VERBS)
