"""Where the integer kernels are found; without the skips of the tests that need them, which ask the same probe."""

import platform
from pathlib import Path

import pytest
import torch

from lightning_qnoise.ops import int8_backend, onednn

CPU = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPU.exists(), reason="the processor's instructions are not listed here")
def test_a_processor_with_vnni_has_them():
    flags = set(CPU.read_text().split())
    if not flags & {"avx512_vnni", "avx_vnni"} or not torch.backends.mkldnn.is_available():
        pytest.skip("this processor, or this torch, has no int8 kernels")
    assert int8_backend("cpu") == "onednn"


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_wrong_sums_are_noticed(name, monkeypatch):
    right = getattr(onednn, name)
    monkeypatch.setattr(onednn, name, lambda *args: right(*args).clamp(max=32767))  # as 16 bits saturate
    assert not onednn.is_exact()


def test_a_torch_without_them_is_noticed(monkeypatch):
    def missing(*args):
        raise AttributeError("qlinear_prepack")

    monkeypatch.setattr(onednn, "pack_linear", missing)
    assert not onednn.is_exact()


@pytest.mark.parametrize("exact, machine", [(False, "x86_64"), (True, "aarch64")])
def test_slow_kernels_are_not_chosen(exact, machine, monkeypatch):
    """Without VNNI `torch._int_mm` is exact, and 40 times as slow as floats."""
    monkeypatch.setattr(onednn, "is_exact", lambda: exact)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    int8_backend.cache_clear()
    found = int8_backend("cpu")
    int8_backend.cache_clear()
    assert found is None


@pytest.mark.parametrize("device_type", ["meta", "cuda"])
def test_other_devices(device_type):
    if device_type == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert int8_backend(device_type) is None


def test_the_default_device_does_not_matter():
    int8_backend.cache_clear()
    with torch.device("meta"):
        found = int8_backend("cpu")
    int8_backend.cache_clear()
    assert found == int8_backend("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nor_does_the_default_dtype(dtype):
    expected = int8_backend("cpu")
    int8_backend.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        assert int8_backend("cpu") == expected
    finally:
        torch.set_default_dtype(torch.float32)
        int8_backend.cache_clear()
