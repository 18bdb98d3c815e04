"""smolforge doctor: what works here, and what it says of a machine where something does not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import filelock
import pytest

from smolforge import cli, devices
from smolforge.cli import doctor
from smolforge.errors import BadInput


def look(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, tuple[str, str]]:
    capsys.readouterr()
    assert cli.run(["doctor", "--json"]) == code
    return {one["about"]: (one["state"], one["found"]) for one in json.loads(capsys.readouterr().out)["findings"]}


def test_everything_is_looked_at(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = look(capsys)
    assert list(found) == ["python", "torch", "device", "speed", "native", "disk", "locks", "hub", "extras"]
    assert "GFLOP/s" in found["speed"][1] and "free in" in found["disk"][1]
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert cli.run(["doctor"]) == 0
    assert "nothing is in the way of training here" in capsys.readouterr().out


def no_locks(*_: object, **__: object) -> bool:
    raise OSError(errno.ENOLCK, "No locks available")


def test_what_does_not_work_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("SMOLFORGE_NATIVE", "0")
    monkeypatch.setattr(filelock, "lock_descriptor", no_locks)
    monkeypatch.setattr(doctor, "EXTRAS", {"web": "fastapi", "wings": "no_such_package"})

    def refuse(wanted: str = "auto") -> None:
        raise BadInput("the driver is too old", field="device", hint="Install a newer one.")

    monkeypatch.setattr(devices, "choose_device", refuse)
    found = look(capsys, code=1)
    assert found["hub"] == ("note", "http://127.0.0.1:9 does not answer (ConnectError): local text and models work")
    assert found["native"][0] == "note" and "SMOLFORGE_NATIVE=0" in found["native"][1]
    assert found["locks"][0] == "fault" and "No locks available" in found["locks"][1]
    assert found["extras"][1] == "web; not here: pip install 'smolforge[wings]'"
    assert found["device"] == ("fault", "device: the driver is too old Install a newer one.")


def test_looking_imports_nothing_that_takes_seconds(tmp_path) -> None:
    """torch has to be imported to be looked at; what is heavy beside it is not."""
    program = (
        "import sys\nfrom smolforge import cli\nassert cli.run(['doctor']) == 0\n"
        "heavy = ('transformers', 'torch._dynamo', 'torch._inductor', 'pyarrow', 'tokenizers', 'tensorboard', 'fastapi',"
        " 'lm_eval', 'gradio', 'wandb', 'scipy', 'pandas', 'sympy')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
