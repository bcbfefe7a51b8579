import pytest
import torch
from references import pack_reference, unpack_reference

from lightning_qnoise.schemes import bits as module
from lightning_qnoise.schemes.bits import pack_bits, packed_length, unpack_bits


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1001])
@pytest.mark.parametrize("bits", range(1, 17))
def test_stream_equals_pure_python(bits, n):
    codes = torch.randint(0, 2**bits, (n,))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numpy().tobytes() == pack_reference(codes.tolist(), bits)
    assert len(packed) == packed_length(n, bits) == -(-n * bits // 8)
    unpacked = unpack_bits(packed, bits, n)
    assert unpacked.dtype == torch.int32
    assert unpacked.tolist() == unpack_reference(packed.numpy().tobytes(), bits, n) == codes.tolist()


@pytest.mark.parametrize("bits", [2, 3, 5, 7, 10])
def test_chunks_leave_no_trace(bits, monkeypatch):
    codes = torch.randint(0, 2**bits, (999,))
    whole = pack_bits(codes, bits)
    monkeypatch.setattr(module, "_CHUNK", 64)
    assert torch.equal(pack_bits(codes, bits), whole)
    assert torch.equal(unpack_bits(whole, bits, 999).long(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtype_and_layout_of_the_codes_do_not_matter(dtype):
    codes = torch.randint(0, 8, (12, 7))
    assert torch.equal(pack_bits(codes.to(dtype).T.contiguous().T, 3), pack_bits(codes.flatten(), 3))
