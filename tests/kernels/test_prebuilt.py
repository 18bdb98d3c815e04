"""The libraries of the wheels, run: on this processor those of x86-64, under an emulator that of aarch64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolforge.kernels import build, variants

HERE = Path(__file__).parent
SYSROOT = Path("/usr/aarch64-linux-gnu")
# Every test that calls the library from Python, in the process of one variant.
CALLERS = [
    "generation/test_runners.py", "generation/test_draft_model.py", "model/test_native_attention.py",
    "model/test_loss.py", "training/test_stochastic_adamw.py",
]  # fmt: skip
RUN_HERE = [v for v in variants.VARIANTS if v.platform == variants.this_platform() and v.flags <= variants.cpu_flags()]
AARCH64 = next(v for v in variants.VARIANTS if v.platform == "linux-aarch64")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prebuilt() -> Iterator[None]:
    """All libraries, built from these sources; removed again where there were none."""
    pytest.importorskip("ziglang", reason="pip install ziglang")
    before = variants.fresh()
    missing = [v for v in variants.VARIANTS if not (before and v.path.is_file())]
    build.build_variants(missing)
    yield
    if not before:
        shutil.rmtree(variants.PREBUILT)


def compile_driver(target: str, folder: Path) -> Path:
    """check.cpp for a target of zig."""
    path = folder / "check"
    command = [sys.executable, "-m", "ziglang", "c++", "-std=c++17", "-O1", "-target", target]
    subprocess.run(
        [*command, "-I", str(variants.HERE), str(HERE / "check.cpp"), "-o", str(path)], check=True, timeout=600
    )
    return path


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("variant", RUN_HERE, ids=lambda v: v.level)
def test_a_variant_computes_what_plain_loops_do(prebuilt, tmp_path, variant) -> None:
    run([str(compile_driver(variant.target, tmp_path)), str(variant.path)])


@pytest.mark.parametrize("variant", RUN_HERE, ids=lambda v: v.level)
def test_a_variant_passes_the_tests_of_its_callers(prebuilt, variant) -> None:
    files = [str(HERE.parent / name) for name in CALLERS]
    run([sys.executable, "-m", "pytest", "-q", "-x", *files], SMOLFORGE_KERNELS=variant.level)


def test_aarch64_computes_what_plain_loops_do(prebuilt, tmp_path) -> None:
    emulator = shutil.which("qemu-aarch64")
    if not emulator or not SYSROOT.is_dir():
        pytest.skip("apt-get install qemu-user libc6-arm64-cross")
    run([emulator, "-L", str(SYSROOT), str(compile_driver(AARCH64.target, tmp_path)), str(AARCH64.path)])


@pytest.mark.parametrize("variant", variants.VARIANTS, ids=lambda v: v.path.name)
def test_every_library_has_every_function(prebuilt, variant) -> None:
    names = variant.path.read_bytes()
    for name in ("open", "close", "step", "pack", "loss", "rounded_adamw", "attention_available"):
        assert f"smolforge_{name}\0".encode() in names
