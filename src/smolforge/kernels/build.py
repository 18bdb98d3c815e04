"""Compile the C++ of this package for this machine, once, and keep the library in the user's cache.

The library's name holds a hash of the sources, the compiler, the flags and the processor, so a change of any of them
compiles anew. `smolforge build-native` does it ahead of time. Where no compiler is installed, pip can bring one: the
package `ziglang` (`pip install 'smolforge[native]'`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from smolforge.errors import SmolforgeError

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
LINK = ("-shared", "-fPIC", "-fvisibility=hidden", "-pthread", *(("-ldl",) if sys.platform == "linux" else ()))
SOURCES = tuple(sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h")))


class NativeUnavailable(SmolforgeError):
    """The library cannot be compiled or loaded here; torch's own kernels do the work."""


def build(directory: Path | None = None) -> Path:
    """Compile the library for this machine, unless it is there already.

    Args:
        directory: where libraries are kept; the user's cache unless given.

    Returns:
        The library's path.

    Raises:
        NativeUnavailable: there is no compiler, or it failed; the message holds its last words.
    """
    compiler = find_compiler()
    directory = directory or _cache_directory()
    path = directory / f"kernels-{_key(compiler)}.so"
    if path.is_file():
        return path
    name = "ziglang" if "ziglang" in compiler else Path(compiler[0]).name
    # A wait that nobody asked for is announced, whoever needs the library.
    print(f"compiling the native code for this processor, once ({name})", file=sys.stderr, flush=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Compiled under another name and renamed: two processes may compile at once, neither sees half a library.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / "native.so"
            files = [str(source) for source in SOURCES if source.suffix == ".cpp"]
            command = [*compiler, *FLAGS, *files, *LINK, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise NativeUnavailable(f"{name} could not compile {path.name}: {done.stderr.strip()[-500:]}")
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{path.name} could not be compiled: {error}") from None
    return path


def find_compiler() -> tuple[str, ...]:
    """The command of the C++ compiler to use.

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


def _key(compiler: tuple[str, ...]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
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
