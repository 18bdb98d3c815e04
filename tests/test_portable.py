"""What systems other than Linux need, as far as Linux can tell: no name of Unix alone at import, and Apple's GPU planned.

Nothing here runs on a Mac or on Windows.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smolforge import devices, files
from smolforge.config import build_config
from smolforge.devices import choose_device, sum_type
from smolforge.errors import BadInput
from smolforge.run import Run, lock_holder, lock_run
from smolforge.training.plan import make_plan

MPS = torch.device("mps")
# All packages that smolforge imports come first: what they need of the system is their own affair.
WITHOUT_UNIX = """
import importlib, os, pkgutil, signal, sys
import smolforge
for name in ("torch", "filelock", "numpy", "pyarrow", "fastapi", "uvicorn", "tensorboard", "fsspec", "rich",
             "huggingface_hub", "prometheus_client", "multiprocessing.pool", "torch.distributed.run", "tokenizers", "gguf"):
    importlib.import_module(name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP"):
    delattr(signal, name)
for name in ("statvfs", "pread", "pwrite", "O_CLOEXEC", "getuid", "fork", "sched_getaffinity", "killpg", "getpgid"):
    delattr(os, name)
found = [module.name for module in pkgutil.walk_packages(smolforge.__path__, "smolforge.")]
for name in set(found) - {"smolforge.__main__", "smolforge.evaluation.tasks"}:  # which needs lm-eval
    importlib.import_module(name)
print(len(found))
from smolforge.training.metrics import memory_in_use
from smolforge.training.shutdown import EXIT_CODES
assert memory_in_use(smolforge.devices.torch.device("cpu")) > 0 and len(EXIT_CODES) == 2
"""


def test_every_module_imports_without_what_only_unix_has() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_UNIX], capture_output=True, text=True)
    assert not done.returncode and int(done.stdout) > 100, done.stderr


def test_a_holder_is_read_behind_the_byte_that_windows_locks(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert lock_holder(run) == ""
    with lock_run(run):
        assert run.lock_path.read_bytes()[:1] == b"\n" and lock_holder(run).startswith("process ")


def test_where_directories_cannot_be_opened_none_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Windows:  # which has no os.open of a directory
        name = "nt"

    monkeypatch.setattr(files, "os", Windows)
    files.sync_directory(tmp_path)


def test_the_cache_is_where_the_system_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.user_cache() == tmp_path / "smolforge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.user_cache() == tmp_path / ".cache" / "smolforge"


def test_an_apple_gpu_is_planned_in_fp32_with_torchs_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == MPS and choose_device().type == "cpu"
    plan = make_plan(build_config("pocket"), MPS, 1)
    assert (plan.precision.name, plan.attention, plan.loss, plan.compile) == ("fp32", "sdpa", "chunked", False)
    bf16 = make_plan(build_config("pocket", ["training.precision=bf16", "training.compile=on"]), MPS, 1)
    assert (bf16.precision.autocast, bf16.attention, bf16.compile) == (torch.bfloat16, "sdpa", False)
    with pytest.raises(BadInput, match="fp16 needs a CUDA device"):
        make_plan(build_config("pocket", ["training.precision=fp16"]), MPS, 1)
    assert (sum_type(MPS), sum_type(torch.device("cpu"))) == (torch.float32, torch.float64)


def test_an_apple_gpu_that_is_not_there_is_refused() -> None:
    assert not torch.backends.mps.is_available()
    with pytest.raises(BadInput, match="no Apple GPU"):
        choose_device("mps")
    assert devices.device_name(MPS) == "mps"
