"""Compile the C++ of this package: for this machine when it is needed, or every variant of every wheel.

    python -m smolforge.kernels.build            for this processor, into the user's cache
    python -m smolforge.kernels.build --all      all variants, into `prebuilt/` (needs the package ziglang)

The name of a library in the cache holds a hash of the sources, the compiler, the flags and the processor, so a change
of any of them compiles anew. Where no compiler is installed, pip brings one: `pip install 'smolforge[native]'`.
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
from collections.abc import Iterable
from pathlib import Path

from smolforge.files import user_cache
from smolforge.kernels import variants
from smolforge.kernels.variants import NativeUnavailable, Variant

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-shared", "-fvisibility=hidden")
_ZIG = (sys.executable, "-m", "ziglang", "c++")
NATIVE = ("-march=native", "-fPIC", "-pthread", *(("-ldl",) if sys.platform == "linux" else ()))


def build(directory: Path | None = None) -> Path:
    """Compile the library for this machine into `directory` or the user's cache, unless it is there; its path.

    Raises:
        NativeUnavailable: there is no compiler, or it failed; the message holds its last words.
    """
    compiler = find_compiler()
    directory = directory or user_cache()
    path = directory / f"kernels-{_key(compiler)}.so"
    if not path.is_file():
        # A wait that nobody asked for is announced, whoever needs the library.
        name = _name(compiler)
        print(f"compiling the native code for this processor, once ({name})", file=sys.stderr, flush=True)
        _compile(compiler, NATIVE, path)
    return path


def build_variants(chosen: Iterable[Variant] = variants.VARIANTS) -> None:
    """Cross-compile prebuilt libraries with zig, a minute each, and note the sources that they are built from.

    Raises:
        NativeUnavailable: the package ziglang is not installed, or it failed.
    """
    if not importlib.util.find_spec("ziglang"):
        raise NativeUnavailable("prebuilt libraries need the compiler of `pip install ziglang`")
    if not variants.fresh():
        shutil.rmtree(variants.PREBUILT, ignore_errors=True)
    for variant in chosen:
        print(f"{variant.platform}: {variant.description}", flush=True)
        # Measured: with loops unrolled by clang, int8 decodes one sequence 12% more slowly; the rest hardly differs.
        options = ("-fno-unroll-loops", "-fPIC", "-s", "-target", variant.target, f"-mcpu={variant.cpu}")
        _compile(_ZIG, options, variant.path)
    variants.HASH.write_text(variants.sources_hash(), encoding="ascii")


def find_compiler() -> tuple[str, ...]:
    """The command of the C++ compiler for this machine; NativeUnavailable where there is none."""
    if sys.byteorder != "little":
        raise NativeUnavailable("native code is written for little-endian machines")
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        found = shutil.which(name)
        if found:
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return _ZIG
    looked = "$CXX, g++, clang++, c++ and the package ziglang"
    raise NativeUnavailable(f"no C++ compiler is installed, `pip install ziglang` brings one (looked for {looked})")


def _name(compiler: tuple[str, ...]) -> str:
    return "ziglang" if compiler == _ZIG else Path(compiler[0]).name


def _compile(compiler: tuple[str, ...], options: tuple[str, ...], path: Path) -> None:
    """Compile under another name and rename: two processes may compile at once, neither sees half a library."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            files = (str(source) for source in variants.SOURCES if source.suffix == ".cpp")
            command = [*compiler, *FLAGS, *files, *options, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode:
                raise NativeUnavailable(f"{_name(compiler)} cannot compile {path.name}: {done.stderr.strip()[-500:]}")
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{path.name} cannot be compiled: {error}") from None


def _key(compiler: tuple[str, ...]) -> str:
    """Hash of the sources, the compiler, its options and what -march=native looks at."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
    processor = (platform.machine(), platform.processor(), variants.cpu_model(), *sorted(variants.cpu_flags()))
    words = (variants.sources_hash(), *FLAGS, *NATIVE, *processor)
    return hashlib.sha256("\0".join(words).encode() + version).hexdigest()[:16]


if __name__ == "__main__":
    if sys.argv[1:] == ["--all"]:
        build_variants()
    else:
        print(build())
