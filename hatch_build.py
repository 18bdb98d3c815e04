"""Put the prebuilt kernels of one platform into a wheel, whose tag then names the platform.

    SMOLFORGE_WHEEL=linux-x86_64 pip wheel . --no-deps      zig comes with pip and compiles what is not compiled yet
    pip wheel . --no-deps                                   with what is compiled already for this platform

Without any, the wheel has no tag of a platform, and the kernels are compiled when they are first used. Installing from
source is therefore quick and needs no zig: the kernels take minutes and zig is a download of 90 MB.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PrebuiltKernels(BuildHookInterface):
    """The hook of pyproject.toml's `[tool.hatch.build.targets.wheel.hooks.custom]`."""

    def dependencies(self) -> list[str]:
        """What pip installs to build: the compiler, where a wheel for a platform is asked for."""
        return ["ziglang==0.17.1"] if os.environ.get("SMOLFORGE_WHEEL") else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile where asked, and add the libraries."""
        if version == "editable":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from smolforge.kernels import build, variants

        asked = os.environ.get("SMOLFORGE_WHEEL")
        platform = asked or variants.this_platform()
        if asked:
            wanted = [v for v in variants.VARIANTS if v.platform == asked and v not in variants.prebuilt(asked)]
            if asked not in variants.TAGS:
                raise SystemExit(f"SMOLFORGE_WHEEL={asked}: known are {', '.join(variants.TAGS)}")
            build.build_variants(wanted)
        found = variants.prebuilt(platform)
        if not found:
            self.app.display_warning("this wheel holds no prebuilt kernels: set SMOLFORGE_WHEEL to make some")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{variants.TAGS[platform]}"
        for path in (*(v.path for v in found), variants.HASH):
            build_data["force_include"][str(path)] = f"smolforge/kernels/prebuilt/{path.name}"
