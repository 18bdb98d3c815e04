"""All C++ of smolforge, as one shared library that is called through ctypes.

On a CPU the library decodes several times as fast as torch's own kernels, and training gains a loss, an update of bf16
weights and, where the processor multiplies bf16, an attention. Each function has a counterpart in torch that runs where
there is no library: only speed depends on it. A wheel brings the library ready built; a source checkout compiles it.
SMOLFORGE_NATIVE=0 turns it off, SMOLFORGE_KERNELS=native or =avx2 chooses another one.

In the order to read them:

    __init__.py    library(): the loaded library; unavailable(): why there is none
    variants.py    the libraries that a wheel brings, and which of them this processor can run
    build.py       compile for this machine, or all libraries of all wheels
    threads.h      run a function on the threads of torch's OpenMP
    memory.h       memory that starts at a cache line
    vectors.h      vectors as wide as the processor's, bfloat16, powers of two
    layout.h       how weights, keys and values lie in memory for decoding
    quantize.h     four bits per weight: the search for scales and minima
    pack.cpp       weights of a checkpoint into that layout, in fp32, bf16, int8 or int4; blocks of GGUF
    matmul.h       rows times a packed matrix
    decode.cpp     one step of a Llama: embedding, layers, head
    attention.cpp  attention for training in bf16, forward and backward
    loss.cpp       cross-entropy of a chunk of tokens and its gradient
    adamw.cpp      AdamW on bf16 weights with stochastic rounding
"""

from __future__ import annotations

import ctypes
import functools
import os

from smolforge.kernels.variants import NativeUnavailable, choose_variant, cpu_flags

__all__ = ["NativeUnavailable", "cpu_flags", "description", "library", "unavailable"]


@functools.cache
def library() -> ctypes.CDLL:
    """Load the library: a prebuilt one that fits this processor, or one that is compiled here first.

    Raises:
        BadInput: SMOLFORGE_KERNELS does not name a library that is here.
        NativeUnavailable: it cannot be compiled or loaded here, or it is turned off.
    """
    if os.environ.get("SMOLFORGE_NATIVE") == "0":
        raise NativeUnavailable("native code is turned off by SMOLFORGE_NATIVE=0")
    from smolforge.kernels.build import build

    variant, _ = choose_variant()
    path = variant.path if variant else build()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} does not load: {error}") from None


def description() -> str:
    """What `library` loads and the reason, for the decisions that a run prints; raises as `library`."""
    library()
    variant, reason = choose_variant()
    what = f"prebuilt for {variant.description}" if variant else "compiled for this processor"
    return f"{what} ({reason})" if reason else what


def unavailable() -> str | None:
    """The reason why there is no library here; None where it is loaded."""
    try:
        library()
    except NativeUnavailable as error:
        return error.message
    return None
