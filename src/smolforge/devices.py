"""Devices: which one a process uses, and what a GPU can do. Nothing here allocates memory on one."""

from __future__ import annotations

import functools
import logging
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smolforge.errors import BadInput, unknown

logger = logging.getLogger(__name__)

# Dense peaks of the makers' data sheets in bf16 with sums in fp32 (T4 and V100: fp16), TFLOP/s, without sparsity; and
# GB of memory, the smaller where a card is sold with two.
CARDS = {
    "B200": (2250, 180), "GB200": (2500, 186), "GH200": (989, 96), "H200": (989, 141), "H100": (989, 80),
    "H100 NVL": (835, 94), "H100 PCIe": (756, 80), "A100": (312, 40), "A40": (150, 48), "A10": (125, 24),
    "A10G": (70, 24), "L40S": (362, 48), "L40": (181, 48), "L4": (121, 24), "T4": (65, 16), "V100": (125, 16),
    "RTX A6000": (155, 48), "RTX 5090": (210, 32), "RTX 5080": (113, 16), "RTX 5070 Ti": (88, 16), "RTX 5070": (62, 12),
    "RTX 5060 Ti": (47, 8), "RTX 5060": (38, 8), "RTX 4090": (165, 24), "RTX 4090 D": (147, 24),
    "RTX 4080 SUPER": (104, 16), "RTX 4080": (97, 16), "RTX 4070 Ti SUPER": (88, 16), "RTX 4070 Ti": (80, 12),
    "RTX 4070 SUPER": (71, 12), "RTX 4070": (58, 12), "RTX 4060 Ti": (44, 8), "RTX 4060": (30, 8),
    "RTX 3090 Ti": (80, 24), "RTX 3090": (71, 24), "RTX 3080 Ti": (68, 12), "RTX 3080": (60, 10),
    "RTX 3070 Ti": (43, 8), "RTX 3070": (41, 8), "RTX 3060 Ti": (32, 8), "RTX 3060": (25, 12),
    "MI300X": (1307, 192), "MI300A": (981, 128), "MI325X": (1307, 256),
}  # fmt: skip
WITHOUT_BF16 = ("T4", "V100")


@dataclass(frozen=True)
class Gpu:
    """What a plan asks of a GPU: bytes of memory, whether it multiplies bf16, and FLOP/s where they are known."""

    name: str
    memory: int
    has_bf16: bool
    peak_flops: float | None

    def __str__(self) -> str:
        return f"{self.name} ({self.memory / 2**30:.0f} GiB)"


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU of a CUDA device of this machine; None for other devices."""
    if device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(device).total_memory
    return Gpu(torch.cuda.get_device_name(device), memory, has_bf16(device), known_peak_flops(device))


def gpu_named(text: str) -> Gpu:
    """A card that need not be here, by its name in `CARDS`: H100, rtx4090, A100-80GB.

    Raises:
        BadInput: no such card is known.
    """
    name, _, memory = re.fullmatch(r"(.*?)(-(\d+)GB)?", text.strip(), re.IGNORECASE).groups()  # type: ignore[union-attr]
    names = {re.sub(r"[\s_-]", "", card).lower(): card for card in CARDS}
    card = names.get(re.sub(r"[\s_-]", "", name).lower())
    if card is None:
        raise unknown("GPU", text, [*CARDS, "cpu (of this machine)"], field="--on")
    teraflops, gigabytes = CARDS[card]
    return Gpu(card, int(memory or gigabytes) * 10**9, card not in WITHOUT_BF16, teraflops * 1e12)


def choose_device(wanted: str = "auto") -> torch.device:
    """The device of a name: cpu, cuda, cuda:N, mps, another of torch's, or auto for CUDA where it works, else the CPU.

    The environment variable SMOLFORGE_DEVICE, which `--device` sets, says what `auto` is. Of several processes on a
    machine each takes the GPU of its LOCAL_RANK.

    Raises:
        BadInput: there is no such device, or it cannot be used.
    """
    asked = os.environ.get("SMOLFORGE_DEVICE", "auto") if wanted == "auto" else wanted
    if asked == "auto":
        missing = _cuda_unavailable()
        if missing and "too old" in missing[0]:
            logger.warning(f"device: cpu, although there is a GPU: {missing[0]}. {missing[1]}")
        asked = "cpu" if missing else "cuda"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise BadInput(
            f"{asked!r} is not a device", field="device", hint="Give cpu, cuda, cuda:N, mps or auto."
        ) from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput("torch finds no Apple GPU on this machine", field="device", hint="Use --device cpu.")
    if device.type != "cuda":
        return device
    if missing := _cuda_unavailable():
        raise BadInput(missing[0], field="device", hint=missing[1])
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        names = ", ".join(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count))
        mig = " CUDA shows a process one MIG instance: name another in CUDA_VISIBLE_DEVICES." if "MIG" in names else ""
        raise BadInput(f"there is no cuda:{index}", field="device", hint=f"Found: {names}.{mig}")
    device = torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)
    built = [int(arch.rpartition("_")[2].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    if built and 10 * major + minor < min(built):
        name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
        problem = f"{name} is too old for torch {torch.__version__}, which was built for sm_{min(built)} and newer"
        raise BadInput(problem, field="device", hint="Use --device cpu, or an older torch.")
    return device


def _cuda_unavailable() -> tuple[str, str] | None:
    """Why this process has no CUDA device, and what helps; None where it has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old: the reason is told below
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None and torch.version.hip is None:
        hint = "Install a build with CUDA, as https://pytorch.org/get-started says, or use --device cpu."
        return f"torch {torch.__version__} was built without CUDA", hint
    try:
        torch.cuda.init()
        reason = "torch does not say why"
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
    if "too old" in reason:
        found = re.search(r"found version (\d+)", reason)
        runs = f", which runs CUDA up to {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else ""
        problem = (
            f"the NVIDIA driver is too old for torch {torch.__version__}, built for CUDA {torch.version.cuda}{runs}"
        )
        return problem, "Update the driver, or install a torch built for an older CUDA."
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all GPUs", "Unset it, or use --device cpu."
    if "driver" in reason.lower():
        return "there is no NVIDIA driver on this machine", "Install the driver, or use --device cpu."
    hint = "A GPU divided by MIG needs an instance (nvidia-smi mig -lci). Or use --device cpu."
    return f"there is no CUDA device ({reason.partition('. ')[0]})", hint


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the copy to a GPU is queued from page-locked memory, and the host goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded one cannot be locked
    return tensor.to(device)


def to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A tensor on the host, and what waits for it: the copy from a GPU is queued behind all that the GPU has to do.

    Reading it a step later costs nothing; `item()` would wait until the GPU has nothing left to do.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu(), lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))  # which need not be the current device
    return host, arrived.synchronize


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU multiplies bf16 (Ampere, sm80, and newer); the same ones have the flash kernel for attention."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def half_precision(device: torch.device) -> torch.dtype:
    """The precision of 16 bits that a device computes fast in: bf16, or fp16 on a GPU without it."""
    return torch.float16 if device.type == "cuda" and not has_bf16(device) else torch.bfloat16


def sum_type(device: torch.device) -> torch.dtype:
    """What long sums of losses are kept in: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def device_name(device: torch.device) -> str:
    """For people, with the memory of a GPU."""
    return str(gpu_of(device) or device.type)


def known_peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a known GPU, for MFU; None for others, for laptops' versions and for a part of one (MIG)."""
    return _peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@functools.cache
def _peak_of(name: str) -> float | None:
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", name):
        return None
    found = [known for known in CARDS if re.search(rf"\b{known}\b", name, re.IGNORECASE)]
    return 1e12 * CARDS[max(found, key=len)][0] if found else None
