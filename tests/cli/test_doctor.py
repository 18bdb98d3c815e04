"""smolforge doctor: what works here, and what it says of a machine where something does not."""

from __future__ import annotations

import json
import sys

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


def test_what_does_not_work_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("SMOLFORGE_NATIVE", "0")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(doctor, "EXTRAS", {"web": "fastapi", "wings": "no_such_package"})

    def refuse(wanted: str = "auto") -> None:
        raise BadInput("the driver is too old", field="device", hint="Install a newer one.")

    monkeypatch.setattr(devices, "choose_device", refuse)
    found = look(capsys, code=1)
    assert found["hub"] == ("note", "http://127.0.0.1:9 does not answer (ConnectError): local text and models work")
    assert found["native"][0] == "note" and "SMOLFORGE_NATIVE=0" in found["native"][1]
    assert found["locks"][0] == "fault" and "fcntl" in found["locks"][1]
    assert found["extras"][1] == "web; not here: pip install 'smolforge[wings]'"
    assert found["device"] == ("fault", "device: the driver is too old Install a newer one.")
