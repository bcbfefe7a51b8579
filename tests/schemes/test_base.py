import copy
import io

import pytest
import torch

from lightning_qnoise import PQ, Int
from lightning_qnoise.schemes import Scheme, matrix_shape

SCHEMES = [
    Int(),
    Int(4, "tensor"),
    Int(3, "group:6", symmetric=True),
    PQ(2, 16),
    PQ(3, 5, "bfloat16"),
    PQ(6, 16, "float32", n_iter=3, seed=2),
]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
FIELDS = {torch.uint8, torch.float16, torch.bfloat16, torch.float32}


@each_scheme
@pytest.mark.parametrize("shape", [(10, 12), (9, 4, 3, 3), (5, 6, 1), (3, 1, 6, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_has_the_shapes_and_dtypes_of_encode(scheme, shape, dtype):
    encoded = scheme.encode(torch.randn(shape).to(dtype))
    for device in ("cpu", "meta"):
        empty = scheme.empty(shape, dtype, device)
        assert empty.shape == encoded.shape and empty.dtype == encoded.dtype and empty.scheme == encoded.scheme
        assert all(buffer.device.type == device for buffer in empty.buffers())
        assert [(k, b.shape, b.dtype) for k, b in empty.named_buffers()] == [
            (k, b.shape, b.dtype) for k, b in encoded.named_buffers()
        ]
    assert {buffer.dtype for buffer in encoded.buffers()} <= FIELDS


@each_scheme
def test_noise_blocks_tile_the_matrix(scheme):
    rows, cols = scheme.noise_blocks((10, 12))
    assert 10 % rows == 0 and 12 % cols == 0
    assert cols == getattr(scheme, "block_size", 1)


@each_scheme
def test_dict_round_trip(scheme):
    data = scheme.to_dict()
    assert data["scheme"] == type(scheme).__name__
    assert Scheme.from_dict(data) == scheme
    assert data == scheme.to_dict()  # from_dict leaves its argument alone


@pytest.mark.parametrize(
    "data, message",
    [
        ({"scheme": "Ternary"}, "unknown scheme 'Ternary'; known are .*Int.*PQ"),
        ({"bits": 4}, "unknown scheme None"),
        ({"scheme": "Int", "bitz": 4}, "Int: .*bitz"),
        ({"scheme": "Int", "bits": 40}, "bits from 2 to 8"),
        ({"scheme": "Int", "bits": "four"}, "Int: "),
    ],
)
def test_from_dict_names_what_is_unknown(data, message):
    with pytest.raises(ValueError, match=message):
        Scheme.from_dict(data)


@each_scheme
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.type(torch.float16),
        lambda m: m.type(torch.float64),
    ],
    ids=["to-bf16", "half", "double", "bfloat16", "type-half", "type-double"],
)
def test_casting_changes_what_is_decoded_and_nothing_stored(scheme, cast):
    weight = torch.randn(10, 12)
    packed = scheme.encode(weight)
    plain, stored = packed.decode(), {k: v.clone() for k, v in packed.state_dict().items()}
    cast(packed)
    assert packed.decode().dtype == packed.dtype != torch.float32
    for key, value in packed.state_dict().items():
        assert value.dtype == stored[key].dtype and torch.equal(value, stored[key])
    packed.float()
    assert torch.equal(packed.decode(), plain)


@each_scheme
def test_moving_between_devices_keeps_dtypes(scheme):
    packed = scheme.encode(torch.randn(10, 12)).to("meta")
    assert packed.decode().is_meta and packed.decode().shape == (10, 12)
    assert {b.dtype for b in packed.buffers()} == {b.dtype for b in scheme.empty((10, 12)).buffers()}
    assert not any(b.is_meta for b in packed.to_empty(device="cpu").buffers())


@each_scheme
def test_linear_and_embedding_are_those_of_the_decoded_weight(scheme):
    packed = scheme.encode(torch.randn(10, 12))
    x, bias, ids = torch.randn(3, 12), torch.randn(10), torch.tensor([[1, 9], [0, 1]])
    torch.testing.assert_close(packed.linear(x, bias), x @ packed.decode().T + bias)
    assert torch.equal(packed.embedding(ids), packed.decode()[ids])


@each_scheme
def test_copies_and_pickles(scheme):
    packed = scheme.encode(torch.randn(10, 12))
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for other in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert other.scheme == scheme and torch.equal(other.decode(), packed.decode())
        assert other.codes.data_ptr() != packed.codes.data_ptr()


@pytest.mark.parametrize("shape, expected", [((3, 4), (3, 4)), ((3, 4, 2, 2), (3, 16)), ((3, 1, 5), (3, 5))])
def test_matrix_shape(shape, expected):
    assert matrix_shape(shape) == expected
    with pytest.raises(ValueError, match="fewer than two dimensions; keep it float"):
        matrix_shape(shape[:1])
