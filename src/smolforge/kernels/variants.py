"""The variants of the library that a wheel brings ready built, and which of them this processor can run.

A variant is used only while its C++ is that of this package: `prebuilt/` holds the libraries and a hash of the sources
that they were built from. Plain AVX-512 has no variant. On a processor with VNNI it decoded no faster than AVX2, and
processors with AVX-512 but without VNNI (2017 to 2019) are served by AVX2.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
from pathlib import Path

from smolforge.errors import SmolforgeError, unknown

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
HASH = PREBUILT / "sources.sha256"
SOURCES = tuple(sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".h")))
# Platforms of wheels and the tags that name them to pip. glibc 2.28 is what torch's own wheels need.
TAGS = {
    "linux-x86_64": "manylinux_2_28_x86_64",
    "linux-aarch64": "manylinux_2_28_aarch64",
    "macos-arm64": "macosx_11_0_arm64",
    "windows-x86_64": "win_amd64",
}


class NativeUnavailable(SmolforgeError):
    """The library cannot be compiled or loaded here; torch's own kernels do the work."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One ready-built library. SMOLFORGE_KERNELS takes its `level`; it runs where the processor has all `flags`."""

    platform: str  # a key of TAGS
    level: str
    description: str
    flags: frozenset[str]  # as `cpu_flags` names them
    target: str  # -target of zig
    cpu: str  # -mcpu of zig

    @property
    def path(self) -> Path:
        """The library's file."""
        suffix = {"macos": "dylib", "windows": "dll"}.get(self.platform.partition("-")[0], "so")
        return PREBUILT / f"{self.platform}-{self.level}.{suffix}"


def _linux(machine: str, level: str, description: str, flags: str, cpu: str) -> Variant:
    return Variant(f"linux-{machine}", level, description, frozenset(flags.split()), f"{machine}-linux-gnu.2.28", cpu)


_AVX2 = "avx2 fma bmi1 bmi2 f16c"
_AVX512 = f"{_AVX2} avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"
VARIANTS = (  # of one platform the fastest first
    _linux("x86_64", "avx512-bf16", "AVX-512 with VNNI and bf16", f"{_AVX512} avx512_bf16",
           "x86_64_v4+avx512vnni+avx512bf16"),
    _linux("x86_64", "avx512-vnni", "AVX-512 with VNNI", _AVX512, "x86_64_v4+avx512vnni"),
    _linux("x86_64", "avx2", "AVX2", _AVX2, "x86_64_v3"),
    _linux("aarch64", "dotprod", "NEON with dot products", "asimddp", "generic+dotprod"),
    Variant("macos-arm64", "m1", "Apple silicon", frozenset(), "aarch64-macos.11.0", "apple_m1"),
    Variant("windows-x86_64", "avx2", "AVX2", frozenset({"avx2"}), "x86_64-windows-gnu", "x86_64_v3"),
)  # fmt: skip


def this_platform() -> str:
    """This machine's platform, as TAGS names it where there is a wheel for it."""
    system, machine = platform.system().lower().replace("darwin", "macos"), platform.machine().lower()
    machine = {"amd64": "x86_64"}.get(machine, machine)
    return f"{system}-{machine}"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Features of the processor as Linux names them; of other systems only what a variant asks for."""
    if platform.system() == "Windows":  # 40: PF_AVX2_INSTRUCTIONS_AVAILABLE
        present = getattr(ctypes, "windll").kernel32.IsProcessorFeaturePresent(40)  # noqa: B009
        return frozenset({"avx2"} if present else ())
    return frozenset(_cpuinfo("flags", "Features").split())  # of x86 and of aarch64


def cpu_model() -> str:
    """The processor's name as Linux has it; "" elsewhere."""
    return _cpuinfo("model name", "CPU part")


def _cpuinfo(*names: str) -> str:
    """The first entry with one of these names in /proc/cpuinfo; the cores of a machine are taken to be alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(names)), "").partition(":")[2].strip()


def sources_hash() -> str:
    """SHA-256 of the names and the bytes of all C++ files."""
    parts = "".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in SOURCES)
    return hashlib.sha256(parts.encode()).hexdigest()


def fresh() -> bool:
    """Whether the libraries in `prebuilt/` were built from these sources."""
    return HASH.is_file() and HASH.read_text(encoding="ascii") == sources_hash()


def prebuilt(name: str) -> tuple[Variant, ...]:
    """The variants of a platform whose libraries are there and were built from these sources."""
    return tuple(v for v in VARIANTS if v.platform == name and v.path.is_file()) if fresh() else ()


def choose_variant() -> tuple[Variant | None, str]:
    """The prebuilt library to load and the reason; None where the library is to be compiled.

    The environment variable SMOLFORGE_KERNELS names a level, or is `native` to compile for this very processor.

    Raises:
        BadInput: SMOLFORGE_KERNELS is not the name of a library that is here.
        NativeUnavailable: SMOLFORGE_KERNELS names one that this processor cannot run.
    """
    asked = os.environ.get("SMOLFORGE_KERNELS", "")
    if asked == "native":
        return None, "SMOLFORGE_KERNELS=native"
    found = prebuilt(this_platform())
    if asked and asked not in (levels := [v.level for v in found]):
        raise unknown("kernels", asked, ["native", *levels], field="SMOLFORGE_KERNELS")
    reason = "none is prebuilt from these sources" if not found else ""
    for variant in found:
        if asked not in ("", variant.level):
            continue
        lacks = variant.flags - cpu_flags()
        if not lacks:
            return variant, f"SMOLFORGE_KERNELS={asked}" if asked else reason
        reason = f"this processor has no {', '.join(sorted(lacks))}"
    if asked:
        raise NativeUnavailable(f"SMOLFORGE_KERNELS={asked}: {reason}")
    return None, reason
