"""Triton's interpreter, in which its kernels run on a CPU, with three repairs that Triton 3.6 needs.

Import `prepare` and call it before anything imports Triton.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch


def prepare() -> None:
    """Make kernels run in the interpreter; skip the calling test file where there is no Triton or it is too late."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    triton = pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for CUDA")
    if not triton.knobs.runtime.interpret:
        pytest.skip("without a GPU Triton has to be imported with TRITON_INTERPRET=1", allow_module_level=True)
    from triton.runtime import interpreter

    builder, types = interpreter.InterpreterBuilder, triton.language
    patch, dot, convert = interpreter._patch_lang_tensor, builder.create_dot, interpreter._convert_float

    def patch_loop_bounds(tensor, scope):
        """Loop bounds are arrays of one element, which numpy 2.4 no longer takes for integers."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_rounded(values, of, to, rounding):
        """To bf16 the interpreter cuts bits off, where a GPU rounds to the nearest."""
        if (of, to) == (types.float32, types.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(values, of, to, rounding)

    def dot_of_bf16(self, a, b, *others):
        """Bf16 is kept as uint16, and the interpreter multiplies those integers."""
        if a.dtype.scalar == b.dtype.scalar == types.bfloat16:
            a, b = (self.cast_impl(tensor, types.float32) for tensor in (a, b))
        return dot(self, a, b, *others)

    interpreter._patch_lang_tensor, interpreter._convert_float = patch_loop_bounds, convert_rounded
    builder.create_dot = dot_of_bf16
