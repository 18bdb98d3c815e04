"""Which library is loaded: the fastest prebuilt one that the processor can run, or one that is compiled here."""

import pytest

from smolforge import kernels
from smolforge.errors import BadInput
from smolforge.kernels import NativeUnavailable, build, variants

FLAGS = {v.level: v.flags for v in variants.VARIANTS if v.platform == "linux-x86_64"}


@pytest.fixture
def prebuilt(monkeypatch, tmp_path):
    """A folder with all libraries, of no content, on a Linux x86-64 machine."""
    monkeypatch.setattr(variants, "PREBUILT", tmp_path)
    monkeypatch.setattr(variants, "HASH", tmp_path / "sources.sha256")
    monkeypatch.setattr(variants, "this_platform", lambda: "linux-x86_64")
    monkeypatch.delenv("SMOLFORGE_KERNELS", raising=False)
    monkeypatch.delenv("SMOLFORGE_NATIVE", raising=False)
    for variant in variants.VARIANTS:
        variant.path.touch()
    variants.HASH.write_text(variants.sources_hash())
    return tmp_path


def processor(monkeypatch, flags) -> None:
    monkeypatch.setattr(variants, "cpu_flags", lambda: frozenset(flags))


def chosen() -> tuple[str | None, str]:
    variant, reason = variants.choose_variant()
    return variant and variant.level, reason


@pytest.mark.parametrize("level, lacks", [("avx512-bf16", ""), ("avx512-vnni", "avx512_bf16"), ("avx2", "avx512_vnni")])
def test_the_fastest_that_the_processor_can_run(prebuilt, monkeypatch, level, lacks) -> None:
    processor(monkeypatch, FLAGS[level] | {"sse4_2"})
    found, reason = chosen()
    assert found == level and lacks in reason and bool(lacks) == bool(reason)


def test_a_processor_that_none_fits_compiles(prebuilt, monkeypatch) -> None:
    processor(monkeypatch, {"sse4_2"})
    found, reason = chosen()
    assert found is None and "avx2" in reason


def test_libraries_of_other_sources_are_not_loaded(prebuilt, monkeypatch) -> None:
    processor(monkeypatch, FLAGS["avx512-bf16"])
    variants.HASH.write_text("other sources")
    assert chosen() == (None, "none is prebuilt from these sources")


def test_a_level_can_be_asked_for(prebuilt, monkeypatch) -> None:
    processor(monkeypatch, FLAGS["avx512-vnni"])
    monkeypatch.setenv("SMOLFORGE_KERNELS", "avx2")
    assert chosen() == ("avx2", "SMOLFORGE_KERNELS=avx2")
    monkeypatch.setenv("SMOLFORGE_KERNELS", "native")
    assert chosen() == (None, "SMOLFORGE_KERNELS=native")
    monkeypatch.setenv("SMOLFORGE_KERNELS", "avx512-bf16")
    with pytest.raises(NativeUnavailable, match="no avx512_bf16"):
        chosen()
    monkeypatch.setenv("SMOLFORGE_KERNELS", "axv2")
    with pytest.raises(BadInput, match="Did you mean 'avx2'"):
        chosen()


def test_a_library_that_does_not_load_is_reported(prebuilt, monkeypatch) -> None:
    processor(monkeypatch, FLAGS["avx2"])
    kernels.library.cache_clear()
    try:
        assert "does not load" in str(kernels.unavailable())
    finally:
        kernels.library.cache_clear()


def test_native_code_can_be_turned_off(monkeypatch) -> None:
    monkeypatch.setenv("SMOLFORGE_NATIVE", "0")
    kernels.library.cache_clear()
    try:
        assert kernels.unavailable() == "native code is turned off by SMOLFORGE_NATIVE=0"
    finally:
        kernels.library.cache_clear()


def test_every_platform_has_a_wheel_and_every_wheel_a_library() -> None:
    assert {v.platform for v in variants.VARIANTS} == set(variants.TAGS)
    assert len({v.path for v in variants.VARIANTS}) == len(variants.VARIANTS)


def test_prebuilt_libraries_need_zig(monkeypatch) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NativeUnavailable, match="pip install ziglang"):
        build.build_variants()
