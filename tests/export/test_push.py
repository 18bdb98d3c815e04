"""Uploading through the real Hub client to a server that speaks its API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from export.hub_server import UploadServer
from smolforge import cli
from smolforge.errors import BadInput, SourceUnavailable
from smolforge.export.push import push

MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
         "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[UploadServer]:
    with UploadServer() as server:
        yield server


def export(run: Path, root: str, *words: str, token: str = "hf_good") -> subprocess.CompletedProcess[str]:
    """In a process of its own, for the client reads its environment once."""
    environment = {**os.environ, "HF_ENDPOINT": root, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_OFFLINE": "0", "HF_HOME": str(run.parent / "hf")}  # fmt: skip
    command = [sys.executable, "-m", "smolforge", "export", str(run), "--to", "hub", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_exactly_the_model_goes_up_in_one_commit(tiny_run: Path, hub: UploadServer) -> None:
    done = export(tiny_run, hub.root, "--out", "me/cat", "--private", "--json")
    assert done.returncode == 0, (done.stderr, hub.unknown)
    told = json.loads(done.stdout)
    newest = tiny_run / "checkpoints" / "last"
    assert hub.repos["me/cat"].keys() == MODEL == {entry["name"] for entry in told["files"]}
    for name, data in hub.repos["me/cat"].items():
        assert data == (newest / name).read_bytes(), name
    assert hub.private["me/cat"] and hub.commits == 1
    assert told["url"].startswith(hub.root)


def test_a_dry_run_sends_nothing(tiny_run: Path, capsys: pytest.CaptureFixture[str], hub: UploadServer) -> None:
    assert cli.run(["export", str(tiny_run), "--to", "hub", "--out", "me/cat", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dry_run"] and told["url"] is None
    assert {entry["name"] for entry in told["files"]} == MODEL
    assert any("license" in note for note in told["notes"])
    assert not hub.repos


def test_each_refusal_is_one_clear_error(tiny_run: Path, hub: UploadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.root)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BadInput, match=r"the token is missing or wrong\n.*hf auth login"):
        push(tiny_run, "me/cat")
    hub.refuse = 403
    with pytest.raises(BadInput, match="the token does not allow it"):
        push(tiny_run, "me/cat")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailable, match=r"cannot reach the Hub for me/cat: .*refused"):
        push(tiny_run, "me/cat")
    assert not any(hub.repos.values())


@pytest.mark.parametrize("name", ["cat", "me/", "me/a--b", "../x", "me/.x", "a/b/c", "me/" + "x" * 100])
def test_a_name_that_is_none(tiny_run: Path, name: str) -> None:
    with pytest.raises(BadInput, match="not a name of a repository"):
        push(tiny_run, name, dry_run=True)
