"""What a product of one row takes besides its operands, on a GPU of 132 processors; the kernels themselves are idle."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qnoise.kernels import common, gemv, table_gemv
from lightning_qnoise.ops import pq_cuda

SIZES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (768, 3072), (3072, 768)]


class Idle:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class Bytes(TorchDispatchMode):
    """Counts the bytes of all new memory."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "view" not in str(func) and "detach" not in str(func):
            self.found += out.numel() * out.element_size()
        return out


@pytest.fixture
def routes(monkeypatch):
    """On a CPU everything but the kernels; the names of those that were called."""
    called = []
    for module in (gemv, table_gemv):
        monkeypatch.setattr(module, "check_device", lambda kernel, *tensors: called.append(kernel))
        monkeypatch.setattr(module, "n_splits", lambda device, *args, **kwargs: splits(*args, **kwargs))
    for module, name in (
        (gemv, "gemv_kernel"),
        (table_gemv, "table_kernel"),
        (table_gemv, "lookup_kernel"),
        (common, "sum_splits_kernel"),
    ):
        monkeypatch.setattr(module, name, Idle())
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    original = common.n_splits

    def splits(*args, **kwargs):
        return original(torch.device("cuda"), *args, **kwargs)

    return called


@pytest.mark.parametrize(("n_out", "n_in"), SIZES)
def test_one_row_takes_a_fifth_of_the_codes_at_most(routes, n_out, n_in):
    x, codes = torch.zeros(1, n_in).half(), torch.zeros(n_out, n_in // 8, dtype=torch.uint8)
    codebook = torch.zeros(256, 8).half()
    with Bytes() as seen:
        pq_cuda.linear(x, codes, codebook)
    assert len(routes) == 1 and 4 * n_out < seen.found <= 0.2 * codes.numel()


def test_a_table_would_take_more(routes):
    """Which is why few outputs have none."""
    x, codes = torch.zeros(1, 4096).half(), torch.zeros(4096, 512, dtype=torch.uint8)
    with Bytes() as seen:
        pq_cuda.linear(x, codes, torch.zeros(256, 8).half(), route="lookup")
    assert seen.found > 0.25 * codes.numel()
