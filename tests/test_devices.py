"""Which device a name means, one clear error for each that cannot be used, and what is known of each card."""

from __future__ import annotations

import pytest
import torch

from cards import CARDS, Card, insert_cards
from smolforge import devices
from smolforge.cli import run
from smolforge.devices import choose_device, half_precision, known_peak_flops, to_device
from smolforge.errors import BadInput

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"


@pytest.fixture
def cuda(monkeypatch):
    """A build with CUDA: `cuda(names)` with these GPUs, `cuda(error=...)` with none that works."""
    for name in ("SMOLFORGE_DEVICE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def insert(names=(), error="", capability=(9, 0)):
        insert_cards([Card(name, 1 << 34, capability) for name in names], error=error, put=monkeypatch.setattr)

    return insert


def refused(wanted="cuda") -> str:
    with pytest.raises(BadInput) as caught:
        choose_device(wanted)
    return str(caught.value)


def test_a_gpu_is_taken_where_it_works(cuda, monkeypatch) -> None:
    cuda(["NVIDIA L4", "NVIDIA L4"])
    assert choose_device() == torch.device("cuda", 0) and choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == torch.device("cuda", 1)
    monkeypatch.setenv("SMOLFORGE_DEVICE", "cpu")
    assert choose_device() == torch.device("cpu") and choose_device("cuda:0") == torch.device("cuda", 0)
    cuda(error=NO_DRIVER)
    monkeypatch.delenv("SMOLFORGE_DEVICE")
    assert choose_device() == torch.device("cpu")


def test_what_is_not_a_device(cuda) -> None:
    assert "'gpu' is not a device" in refused("gpu") and "cuda:N" in refused("gpu")


def test_a_build_without_cuda(cuda, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"torch {torch.__version__} was built without CUDA" in refused() and "pytorch.org" in refused()


def test_no_gpu_but_a_cuda_build(cuda, monkeypatch) -> None:
    cuda(error=NO_DRIVER)
    assert "there is no NVIDIA driver on this machine" in refused()
    cuda(error="No CUDA GPUs are available")
    assert "no CUDA device (No CUDA GPUs are available)" in refused("cuda:0") and "MIG" in refused("cuda:0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides all GPUs" in refused()


def test_a_driver_too_old(cuda, caplog) -> None:
    cuda(error=TOO_OLD)
    message = refused()
    assert "driver is too old" in message and "built for CUDA 12.8, which runs CUDA up to 11.4" in message
    assert choose_device() == torch.device("cpu")
    assert "although there is a GPU" in caplog.text, "auto must not train on the CPU silently"


def test_an_index_that_is_not_there(cuda) -> None:
    cuda(["NVIDIA L4", "Tesla T4"])
    assert "there is no cuda:2" in refused("cuda:2") and "cuda:0 NVIDIA L4, cuda:1 Tesla T4" in refused("cuda:2")
    cuda(["NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
    assert "one MIG instance" in refused("cuda:1") and choose_device("cuda:0") == torch.device("cuda", 0)


def test_a_card_older_than_the_build(cuda) -> None:
    cuda(["Tesla K80"], capability=(3, 7))
    assert "Tesla K80 (sm_37) is too old for torch" in refused() and "built for sm_75 and newer" in refused()


def test_the_command_line_names_a_device(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("SMOLFORGE_DEVICE", "cpu")
    assert run(["train", "--out", str(tmp_path / "run"), "--device", "gpu"]) == 2
    assert "'gpu' is not a device" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "teraflops"), [
    ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
    ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA B200", 2250), ("Tesla T4", 65),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4070 Ti SUPER", 88), ("NVIDIA GeForce RTX 3060 Ti", 32),
    ("NVIDIA GeForce RTX 5090", 210), ("AMD Instinct MI300X", 1307), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce GTX 1080", None), ("NVIDIA T400 4GB", None),
])  # fmt: skip
def test_the_peak_of_a_card(cuda, name, teraflops) -> None:
    cuda([name])
    assert known_peak_flops(torch.device("cuda")) == (teraflops and teraflops * 1e12)
    assert known_peak_flops(torch.device("cpu")) is None


def test_sixteen_bits_of_a_device(cuda) -> None:
    gpu = torch.device("cuda")
    cuda(["Tesla T4"], capability=(7, 5))
    assert half_precision(gpu) == torch.float16 and not devices.has_bf16(gpu)
    cuda(["NVIDIA L4"], capability=(8, 9))
    assert half_precision(gpu) == torch.bfloat16 == half_precision(torch.device("cpu"))


def test_each_of_two_unequal_cards_has_its_own_precision(monkeypatch) -> None:
    insert_cards([CARDS["T4"], CARDS["4090"]], put=monkeypatch.setattr)
    assert [half_precision(torch.device("cuda", i)) for i in range(2)] == [torch.float16, torch.bfloat16]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_expanded_tensor_can_be_moved() -> None:
    """Memory that several elements share cannot be page-locked as it is."""
    ids = torch.arange(4).expand(3, 4)
    assert torch.equal(to_device(ids, torch.device("cuda")).cpu(), ids)
