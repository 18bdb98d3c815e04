"""The native library: built once with the system's compiler, cached, loaded through ctypes.

It lies in the user's cache directory under a name that holds the sources, the compiler and the machine, so a
change of any of them builds anew. `build_native` does it ahead of time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from smolforge.errors import SmolforgeError

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "pack.cpp"))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
LINK = ("-shared", "-fPIC", "-pthread")


class NativeUnavailable(SmolforgeError):
    """The native step cannot be built or loaded here; the stock path does the work."""


def build_native(directory: Path | None = None) -> Path:
    """Build the native step for this machine, or find it built; the path of the library.

    Args:
        directory: where libraries are kept; the user's cache unless given.

    Raises:
        NativeUnavailable: there is no compiler, or it failed; the message holds its last words.
    """
    compiler = _compiler()
    directory = directory or _cache_directory()
    path = directory / f"native-{_key(compiler)}.so"
    if path.is_file():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Built under another name and renamed: two processes may build at once, neither sees half a library.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / "native.so"
            command = [compiler, *FLAGS, *LINK, *map(str, SOURCES), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise NativeUnavailable(f"{compiler} could not build the native step: {done.stderr.strip()[-500:]}")
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the native step could not be built: {error}") from None
    return path


def _compiler() -> str:
    if os.environ.get("SMOLFORGE_NATIVE") == "0":
        raise NativeUnavailable("the native step is turned off by SMOLFORGE_NATIVE=0")
    if sys.byteorder != "little":
        raise NativeUnavailable("the native step is written for little-endian machines")
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        found = shutil.which(name)
        if found:
            return found
    raise NativeUnavailable("no C++ compiler is installed (looked for $CXX, g++, clang++, c++)")


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "smolforge"


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
    parts = (*(source.read_bytes() for source in SOURCES), version, " ".join(FLAGS).encode(), _cpu().encode())
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _cpu() -> str:
    """What `-march=native` looks at: the processor's name and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "model name", "Features", "CPU part")
    return platform.machine() + "".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


@functools.cache
def library() -> Any:
    """The loaded library, built first where it is not.

    Raises:
        NativeUnavailable: it cannot be built or loaded here.
    """
    path = build_native()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} does not load: {error}") from None
    loaded.smolforge_open.restype = ctypes.c_void_p
    return loaded
