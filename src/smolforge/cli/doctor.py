"""smolforge doctor: what works on this machine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smolforge.cli.options import add_json, print_result

# Each extra, and the package whose presence shows it.
EXTRAS = {"web": "fastapi", "documents": "pypdf", "eval": "lm_eval", "native": "ziglang", "track": "wandb"}


def add(verbs: Any) -> None:
    """Describe the verb's arguments."""
    parser = verbs.add_parser(
        "doctor",
        help="what works on this machine",
        description="Look at Python, the processor, the GPU, the native code, the disk and the extras. Nothing is\n"
        "compiled, fetched or changed. Exit code 1 where training here would fail.",
        epilog="example:\n  smolforge doctor\n",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look at everything."""
    found = list(_findings())
    marks = {"ok": "ok  ", "note": "note", "fault": "FAULT"}
    lines = [f"{marks[one['state']]:<6}{one['about']:<10} {one['found']}" for one in found]
    faults = sum(one["state"] == "fault" for one in found)
    lines.append(f"{faults} faults" if faults else "nothing is in the way of training here")
    print_result(args, {"findings": found, "faults": faults}, "\n".join(lines))
    return 1 if faults else 0


def _findings() -> Iterator[dict[str, str]]:
    """What each check found; one that fails is a finding too."""
    from smolforge.errors import SmolforgeError

    checks: dict[str, Callable[[], tuple[str, str]]] = {
        "python": _python, "torch": _torch, "device": _device, "speed": _speed, "native": _native, "disk": _disk,
        "locks": _locks, "hub": _hub, "extras": _extras,
    }  # fmt: skip
    for about, check in checks.items():
        try:
            state, found = check()
        except (SmolforgeError, OSError, ImportError) as error:
            state, found = "fault", " ".join(str(error).split())
        yield {"about": about, "state": state, "found": found}


def _python() -> tuple[str, str]:
    import platform

    import smolforge

    tried = "" if sys.platform == "linux" else "; smolforge is tested on Linux only"
    found = f"smolforge {smolforge.__version__} on Python {platform.python_version()}, {platform.platform()}{tried}"
    return ("note" if tried else "ok"), found


def _torch() -> tuple[str, str]:
    import torch

    from smolforge.limits import physical_cores

    return "ok", f"{torch.__version__}, {physical_cores(1)} cores for it"


def _device() -> tuple[str, str]:
    import torch

    from smolforge.devices import choose_device, device_name
    from smolforge.training.precision import choose_precision

    device = choose_device()
    precision, reason = choose_precision("auto", device)
    apple = torch.backends.mps.is_available() and device.type == "cpu"
    more = "; an Apple GPU is there, and --device mps is not tested" if apple else ""
    return "ok", f"{device_name(device)}, trains in {precision.name} ({reason}){more}"


def _speed() -> tuple[str, str]:
    import time

    import torch

    from smolforge.devices import choose_device

    device, size = choose_device(), 1024
    left = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((left @ left)[0, 0])
        best = min(best, time.perf_counter() - began)
    return "ok", f"{2 * size**3 / best / 1e9:,.0f} GFLOP/s in fp32 matrix products"


def _native() -> tuple[str, str]:
    from smolforge.kernels.build import find_compiler
    from smolforge.kernels.variants import NativeUnavailable, choose_variant

    if os.environ.get("SMOLFORGE_NATIVE") == "0":
        return "note", "turned off by SMOLFORGE_NATIVE=0: torch alone generates several times slower"
    try:
        variant, _ = choose_variant()
        if variant is not None:
            return "ok", f"prebuilt for {variant.description}"
        return "ok", f"compiled when first used, by {' '.join(find_compiler())}"
    except NativeUnavailable as error:
        return "note", f"{error.message}; torch alone generates several times slower"


def _disk() -> tuple[str, str]:
    from smolforge.data.cache import cache_directory
    from smolforge.files import free_bytes
    from smolforge.formatting import size

    here, cache = Path.cwd(), cache_directory(None)
    free, writes = free_bytes(here), os.access(here, os.W_OK)
    state = "fault" if not writes else "note" if free < 5 << 30 else "ok"
    refused = "" if writes else ", which cannot be written"
    return state, f"{size(free)} free in {here}{refused}; {size(free_bytes(cache))} in the cache {cache}"


def _locks() -> tuple[str, str]:
    import tempfile

    from filelock import lock_descriptor

    with tempfile.TemporaryFile(dir=Path.cwd() if os.access(Path.cwd(), os.W_OK) else None) as file:
        try:
            lock_descriptor(file.fileno(), blocking=False)
        except OSError as error:
            return "fault", f"files cannot be locked here ({error}), so two processes could write one run"
    return "ok", "files can be locked here, so no run is written twice at a time"


def _hub() -> tuple[str, str]:
    import httpx

    from smolforge import hub

    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if hub.is_offline():
        return "note", "HF_HUB_OFFLINE: only what is on this machine is used"
    try:
        status = httpx.head(address, timeout=2.0).status_code
    except httpx.HTTPError as error:
        return "note", f"{address} does not answer ({type(error).__name__}): local text and models work"
    return "ok", f"{address} answers ({status})"


def _extras() -> tuple[str, str]:
    import importlib.util

    missing = [extra for extra, package in EXTRAS.items() if importlib.util.find_spec(package) is None]
    there = [extra for extra in EXTRAS if extra not in missing]
    install = f"; not here: pip install 'smolforge[{','.join(missing)}]'" if missing else ""
    return "ok", f"{', '.join(there) or 'none'}{install}"
