"""A wheel in an empty environment without a compiler trains, generates and serves at native speed (`make wheel-check`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path

import pytest

from smolforge.kernels import variants

ROOT = Path(__file__).parents[2]
LARGEST = 12 << 20  # bytes of a wheel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of an environment that holds the wheel with its `web` extra, and no compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    if variants.this_platform() not in variants.TAGS:
        pytest.skip("no wheel is made for this platform")
    environment = os.environ | {"SMOLFORGE_WHEEL": variants.this_platform()}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, env=environment, check=True, timeout=1800)
    (wheel,) = folder.glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    assert wheel.stat().st_size < LARGEST and variants.TAGS[variants.this_platform()] in wheel.name
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", *constraints, f"{wheel}[web]"]
    subprocess.run(pip, check=True, timeout=1800)
    return programs


@pytest.fixture(scope="module")
def environment(installed, tmp_path_factory) -> dict[str, str]:
    """Only the environment's own programs: no compiler, none of this checkout's code, an empty cache."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: os.environ[name] for name in ("LANG", "OMP_NUM_THREADS") if name in os.environ}
    found = subprocess.run(
        [installed / "python", "-c", "import importlib.util as u; print(u.find_spec('ziglang'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "None"
    return kept | {"PATH": str(installed), "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}


@pytest.fixture(scope="module")
def model(installed, environment, tmp_path_factory) -> Path:
    """A run of 20 steps."""
    out = tmp_path_factory.mktemp("run") / "pocket"
    text = smolforge(installed, environment, "train", "pocket", "--steps", "20", "--out", str(out))
    assert "kernels: prebuilt for" in text and "loss: native" in text
    return out


def smolforge(installed: Path, environment: dict[str, str], *arguments: str) -> str:
    command = [str(installed / "smolforge"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_it_generates_with_a_prebuilt_library(installed, environment, model) -> None:
    text = smolforge(installed, environment, "generate", str(model), "Once", "--max-tokens", "20")
    assert "kernels: prebuilt for" in text and "native" in text
    assert not list(Path(environment["XDG_CACHE_HOME"]).rglob("kernels-*")), "nothing is compiled"


def test_it_serves(installed, environment, model) -> None:
    command = [str(installed / "smolforge"), "serve", str(model), "--port", "18231"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            for _ in range(120):
                time.sleep(1)
                assert server.poll() is None, server.stdout and server.stdout.read()
                try:
                    with urllib.request.urlopen("http://127.0.0.1:18231/health", timeout=5) as answer:
                        health = json.load(answer)
                    break
                except OSError:
                    continue
            assert health["status"] == "ok"
        finally:
            server.terminate()
