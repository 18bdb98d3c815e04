"""All C++ of smolforge, as one shared library that is called through ctypes.

On a CPU the library decodes several times as fast as torch's own kernels, and training gains a loss, an update of bf16
weights and, where the processor multiplies bf16, an attention. Each function has a counterpart in torch that runs where
there is no library, so nothing depends on it but speed. SMOLFORGE_NATIVE=0 turns it off.

In the order to read them:

    __init__.py    library(): the loaded library; unavailable(): why there is none
    build.py       compile the library for this machine, once, and keep it in the user's cache
    threads.h      run a function on the threads of torch's OpenMP
    memory.h       memory that starts at a cache line
    vectors.h      vectors as wide as the processor's, bfloat16, powers of two
    layout.h       how weights, keys and values lie in memory for decoding
    pack.cpp       weights of a checkpoint into that layout, in fp32, bf16, int8 or int4
    matmul.h       rows times a packed matrix
    decode.cpp     one step of a Llama: embedding, layers, head
    attention.cpp  attention for training in bf16, forward and backward
    loss.cpp       cross-entropy of a chunk of tokens and its gradient
    adamw.cpp      AdamW on bf16 weights with stochastic rounding
"""

from __future__ import annotations

import ctypes
import functools

from smolforge.kernels import build
from smolforge.kernels.build import NativeUnavailable

__all__ = ["NativeUnavailable", "library", "unavailable"]


@functools.cache
def library() -> ctypes.CDLL:
    """Load the library, which is compiled first where it is not.

    Raises:
        NativeUnavailable: it cannot be compiled or loaded here, or it is turned off.
    """
    path = build.build()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} does not load: {error}") from None


def unavailable() -> str | None:
    """The reason why there is no library here; None where it is loaded."""
    try:
        library()
    except NativeUnavailable as error:
        return error.message
    return None
