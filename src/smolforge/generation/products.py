"""Products with packed weights by torch's own kernels for CPUs: rows (M, K) in, in fp32 or bf16, rows (M, N) out.

Each is a module that TorchScript compiles, and runs in Python as well. Which kernel is behind one was measured on
AVX-512 and AVX2 (docs/log.md): one row of bf16 goes through torch's own matrix-vector product, which wants oneDNN
turned off (`one_row`), for oneDNN takes 1.4 times as long; int8 is fbgemm's, which rounds the rows to 8 bits too and
multiplies integers; int4 torch's, and int8 on processors without fbgemm too.

Shapes: M rows, K inputs, N outputs.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolforge.generation.arena import Arena
from smolforge.generation.quantize import Int4, Int8, Weight

FEW_ROWS = 32  # above this many rows, unpacking the weights costs less than torch's own packed kernels lose


class Plain(nn.Module):
    """fp32 or bf16 weights as they are, on large pages."""

    weight: Tensor

    def __init__(self, weight: Tensor, arena: Arena) -> None:
        super().__init__()
        self.register_buffer("weight", arena.keep(weight))
        # Without bf16 in hardware torch multiplies many rows as slowly as one after another.
        self.widen = weight.dtype == torch.bfloat16 and not multiplies_bf16()

    def forward(self, x: Tensor) -> Tensor:
        rows, x = x.shape[0], x.to(self.weight.dtype)
        if self.weight.dtype == torch.float32 and rows <= 8:
            # MKL reads the weights best as its left matrix, and one column of a product slower than two.
            columns = torch.cat((x, x)).t() if rows == 1 else x.t()
            return torch.mm(self.weight, columns).narrow(1, 0, rows).t().contiguous()
        if rows == 1:
            return torch.mv(self.weight, x.squeeze(0)).unsqueeze(0)
        if self.widen and rows > 16:
            return F.linear(x.float(), self.weight.float())
        return F.linear(x, self.weight)


class Int8Rounding(nn.Module):
    """int8 weights in fbgemm's packing; the rows are rounded as well, each to 255 steps between its extremes.

    Raises:
        AttributeError: this torch has it no more (it is called deprecated since 2.13).
    """

    def __init__(self, weight: Int8) -> None:
        super().__init__()
        scales = weight.scales.double()
        with _engine("fbgemm"):
            # Not torch.ops.aten's, whose warning no filter would catch.
            make = torch._make_per_channel_quantized_tensor  # pyright: ignore[reportPrivateImportUsage]
            whole = make(weight.values, scales, torch.zeros_like(scales).long(), 0)
            self.packed = torch.ops.quantized.linear_prepack(whole, None)
        self.nbytes = weight.values.nbytes + weight.scales.nbytes
        # Two products of 8 bits do not fit into the 16 bits where processors without VNNI add them up.
        self.narrow = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if x.shape[0] == 1:
            return torch.ops.quantized.linear_dynamic(x, self.packed, self.narrow)
        # fbgemm rounds all rows to one grid: brought to one size, no row loses bits to a larger one beside it.
        size = x.abs().amax(1, keepdim=True).clamp_min(1e-30)
        return torch.ops.quantized.linear_dynamic(x / size, self.packed, self.narrow) * size


class Int8Unpacking(nn.Module):
    """int8 weights, rows in bf16: where fbgemm is not."""

    values: Tensor
    scales: Tensor

    def __init__(self, weight: Int8, arena: Arena) -> None:
        super().__init__()
        self.register_buffer("values", arena.keep(weight.values))
        self.register_buffer("scales", weight.scales.bfloat16())
        # torch's kernel reads whole vectors, past the end of other widths.
        self.few = FEW_ROWS if weight.values.shape[1] % 32 == 0 else 0

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        if x.shape[0] > self.few:
            return F.linear(x, self.values.to(torch.bfloat16)) * self.scales
        return torch.ops.aten._weight_int8pack_mm(x, self.values, self.scales)


class Int4Unpacking(nn.Module):
    """int4 weights in torch's packing, rows in bf16."""

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: Int4) -> None:
        super().__init__()
        self.group, self.width = weight.group, weight.values.shape[1]
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.values.int(), 1))
        scales = weight.scales.t()
        self.register_buffer("scales", torch.stack((scales, torch.zeros_like(scales)), -1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.to(torch.bfloat16), (0, self.width - x.shape[1]))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scales)


def product(weight: Weight, inputs: int, arena: Arena) -> nn.Module:
    """The product with a weight (N, K).

    Args:
        inputs: K, which int4 may have padded.
        arena: where weights go that torch does not pack for itself.
    """
    if isinstance(weight, Int8):
        if "fbgemm" in torch.backends.quantized.supported_engines:
            with contextlib.suppress(AttributeError):
                return Int8Rounding(weight)
        return Int8Unpacking(weight, arena)
    if isinstance(weight, Int4):
        n, k = weight.values.shape
        if n % 16 or k % weight.group:  # a shape that torch's kernel does not have
            return Plain(weight.dequantize()[:, :inputs].bfloat16(), arena)
        return Int4Unpacking(weight)
    return Plain(weight, arena)


@contextlib.contextmanager
def one_row() -> Iterator[None]:
    """Leave oneDNN out, for products with one row; a setting of the process, which changes speed and no meaning."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def multiplies_bf16() -> bool:
    """Whether oneDNN does, as torch's compiler asks it."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextlib.contextmanager
def _engine(name: str) -> Iterator[None]:
    """Pack for one of torch's quantized engines, without the warning that this will go."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.quantized.engine = before
