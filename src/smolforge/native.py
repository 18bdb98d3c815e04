"""Native libraries: built once with the machine's compiler, cached, loaded through ctypes.

Each is some C++ files beside the Python that calls it (`generation/native.py`, `model/native_attention.py`). A library
lies in the user's cache directory under a name that holds its sources, the compiler and the machine, so a change of any
of them builds anew. `smolforge build-native` does it ahead of time. Where no compiler is installed the package
`ziglang` is one that pip brings (`pip install 'smolforge[native]'`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from smolforge.errors import SmolforgeError

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
# What torch brings (its OpenMP) is looked up when a library is loaded; Apple's linker has to be told so.
LINK = ("-shared", "-fPIC", "-pthread", *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()))


THREADS, VECTORS = (Path(__file__).with_name(name) for name in ("threads.h", "vectors.h"))  # what the C++ files share


class NativeUnavailable(SmolforgeError):
    """A native library cannot be built or loaded here; torch's own kernels do the work."""


def build(sources: Sequence[Path], directory: Path | None = None) -> Path:
    """Build the library of some sources for this machine, or find it built; its path.

    Args:
        sources: C++ files and their headers; the first one names the library.
        directory: where libraries are kept; the user's cache unless given.

    Raises:
        NativeUnavailable: there is no compiler, or it failed; the message holds its last words.
    """
    compiler = find_compiler()
    directory = directory or _cache_directory()
    path = directory / f"{sources[0].stem}-{_key(compiler, sources)}.so"
    if path.is_file():
        return path
    name = "ziglang" if "ziglang" in compiler else Path(compiler[0]).name
    # Unasked work that takes this long is announced, whoever needs the library.
    print(f"compiling {sources[0].name} for this processor, once ({name})", file=sys.stderr, flush=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Built under another name and renamed: two processes may build at once, neither sees half a library.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / "native.so"
            files = [str(source) for source in sources if source.suffix == ".cpp"]
            command = [*compiler, *FLAGS, *LINK, *files, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise NativeUnavailable(f"{name} could not build {path.name}: {done.stderr.strip()[-500:]}")
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{path.name} could not be built: {error}") from None
    return path


@functools.cache
def load(sources: tuple[Path, ...]) -> ctypes.CDLL:
    """The loaded library of some sources, built first where it is not.

    Raises:
        NativeUnavailable: it cannot be built or loaded here.
    """
    path = build(sources)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} does not load: {error}") from None


def unavailable(sources: tuple[Path, ...]) -> str | None:
    """Why a library cannot be built or loaded here, in words; None where it is loaded now."""
    try:
        load(sources)
    except NativeUnavailable as error:
        return error.message
    return None


def find_compiler() -> tuple[str, ...]:
    """The command of the C++ compiler to build with.

    Raises:
        NativeUnavailable: there is none, or native code is turned off.
    """
    if os.environ.get("SMOLFORGE_NATIVE") == "0":
        raise NativeUnavailable("native code is turned off by SMOLFORGE_NATIVE=0")
    if sys.byteorder != "little":
        raise NativeUnavailable("native code is written for little-endian machines")
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        found = shutil.which(name)
        if found:
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return sys.executable, "-m", "ziglang", "c++"
    looked = "$CXX, g++, clang++, c++ and the package ziglang"
    raise NativeUnavailable(f"no C++ compiler is installed, `pip install ziglang` brings one (looked for {looked})")


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "smolforge"


def _key(compiler: tuple[str, ...], sources: Sequence[Path]) -> str:
    parts = (
        *(source.read_bytes() for source in sources),
        _version(compiler),
        " ".join(FLAGS).encode(),
        _cpu().encode(),
    )
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


@functools.cache
def _version(compiler: tuple[str, ...]) -> bytes:
    """What the compiler says it is: a process of its own, asked once for all libraries."""
    return subprocess.run([*compiler, "--version"], capture_output=True, check=False, timeout=60).stdout


def _cpu() -> str:
    """What `-march=native` looks at: the processor's name and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "model name", "Features", "CPU part")
    return platform.machine() + "".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
