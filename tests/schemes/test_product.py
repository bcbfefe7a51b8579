import numpy as np
import pytest
import torch
from references import inertia, pack_reference, pq_reference, squared_distances, unpack_reference

from lightning_qnoise import PQ
from lightning_qnoise.schemes import product

SHAPES = [(12, 24), (5, 3, 8), (16, 4, 3, 3), (8, 1, 3, 3), (4, 2, 2, 2, 3), (7, 6)]


def few_blocks(shape, block_size, n, dtype=torch.float32):
    """A weight with at most `n` distinct blocks, of values that float16 and bfloat16 hold."""
    blocks = torch.randint(-8, 9, (n, block_size)).to(dtype) / 4
    count = torch.Size(shape).numel() // block_size
    return blocks[torch.randint(0, n, (count,))].view(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codebook_dtype", ["float16", "bfloat16", "float32"])
def test_few_distinct_blocks_are_exact(shape, codebook_dtype):
    size = 9 if shape[-1] == 3 and len(shape) == 4 else 2
    size = 3 if len(shape) == 5 else size
    weight = few_blocks(shape, size, 6)
    packed = PQ(size, 6, codebook_dtype).encode(weight)
    assert torch.equal(packed.decode(), weight)
    assert packed.codebook.dtype == getattr(torch, codebook_dtype)


def test_float32_codebook_holds_any_value():
    weight = torch.randn(6, 8)[torch.randint(0, 6, (50,))]
    assert torch.equal(PQ(8, 6, "float32").encode(weight).decode(), weight)
    assert not torch.equal(PQ(8, 6, "float16").encode(weight).decode(), weight)


@pytest.mark.parametrize(
    "k", [*range(2, 18), 31, 32, 33, 100, 127, 128, 129, 255, 256, 257, 300, 511, 512, 513, 1000, 1024]
)
def test_codes_are_stored_at_exact_bits(k):
    bits = next(b for b in range(1, 17) if 2**b >= k)
    weight = torch.arange(k).repeat(2)[: 2 * k - 1, None].float() / 8 + torch.zeros(1, 2)
    weight = weight[torch.randperm(len(weight))]
    packed = PQ(2, k, "float32").encode(weight)
    n = len(weight)
    assert packed.scheme.bits == bits
    assert packed.codes.dtype == torch.uint8 and len(packed.codes) == -(-n * bits // 8)
    codes = unpack_reference(packed.codes.numpy().tobytes(), bits, n)
    assert max(codes) == k - 1
    assert pack_reference(codes, bits) == packed.codes.numpy().tobytes()
    assert packed.indices().flatten().tolist() == codes
    assert torch.equal(packed.decode(), weight)


@pytest.mark.parametrize("shape, size", [((33, 24), 8), ((16, 4, 3, 3), 9), ((30, 10, 1, 1), 5)])
def test_decode_looks_up_codewords_in_documented_order(shape, size):
    packed = PQ(size, 7).encode(torch.randn(shape))
    expected = pq_reference(packed.indices().numpy(), packed.codebook.float().numpy(), shape)
    np.testing.assert_array_equal(packed.decode().numpy(), expected)


def test_every_block_has_its_nearest_codeword():
    weight = torch.randn(128, 64)
    packed = PQ(8, 64).encode(weight)
    distances = squared_distances(weight.view(-1, 8).numpy(), packed.codebook.float().numpy())
    chosen = distances[np.arange(len(distances)), packed.indices().flatten().numpy()]
    np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-5, atol=1e-6)


def test_start_goes_on_from_an_earlier_codebook():
    weight = torch.randn(256, 64)
    once = PQ(8, 64, "float32", n_iter=2).encode(weight)
    twice = PQ(8, 64, "float32", n_iter=2).encode(weight, once)
    values = [inertia(weight.view(-1, 8).numpy(), p.codebook.numpy()) for p in (once, twice)]
    four = PQ(8, 64, "float32", n_iter=4).encode(weight)
    assert values[1] < values[0]
    torch.testing.assert_close(twice.codebook, four.codebook, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [2, 8, 64])
def test_blocks_of_zeros_stay_exactly_zero(k):
    weight = torch.randn(64, 32) * 1e-3
    zero = torch.rand(64, 4) < 0.2
    weight.view(64, 4, 8)[zero] = 0
    packed = PQ(8, k).encode(weight)
    assert (packed.decode().view(64, 4, 8)[zero] == 0).all()
    moved = weight + 0.01
    moved.view(64, 4, 8)[zero] = 0
    again = PQ(8, k).encode(moved, packed)
    assert (again.decode().view(64, 4, 8)[zero] == 0).all()
    assert not PQ(8, k).encode(torch.zeros(8, 8)).decode().any()


def test_unused_codewords_are_zero():
    packed = PQ(2, 16).encode(few_blocks((8, 8), 2, 3))
    assert len(packed.codebook.unique(dim=0)) <= 4 and not packed.codebook[3:].any()


@pytest.mark.parametrize("value, dtype", [(7e4, "float16"), (1e30, "bfloat16"), (float("nan"), "float16")])
def test_what_a_codebook_cannot_hold_is_refused(value, dtype):
    weight = torch.randn(16, 8)
    weight[3, 3] = value
    with pytest.raises(ValueError, match=r"overflow a float16|NaN, Inf or values too large"):
        PQ(4, 4, dtype).encode(weight)
    weight[3, 3] = 6e4
    assert torch.isfinite(PQ(4, 4, dtype).encode(weight).decode()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_go_through_float32(dtype):
    weight = torch.randn(32, 16).to(dtype)
    packed, expected = PQ(4, 16).encode(weight), PQ(4, 16).encode(weight.float())
    assert packed.dtype == packed.decode().dtype == dtype
    assert torch.equal(packed.codes, expected.codes) and torch.equal(packed.codebook, expected.codebook)
    assert torch.equal(packed.decode(), expected.decode().to(dtype))


def test_layout_in_memory_does_not_matter():
    weight = torch.randn(16, 4, 3, 3)
    expected = PQ(9, 16).encode(weight)
    turned = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for other in (weight.to(memory_format=torch.channels_last), turned):
        assert not other.is_contiguous()
        assert torch.equal(PQ(9, 16).encode(other).codes, expected.codes)
        assert torch.equal(PQ(9, 16).encode(other).decode(), expected.decode())


@pytest.mark.parametrize("n_blocks", [257, 64])
def test_follow_moves_only_masked_blocks(n_blocks):
    weight = torch.randn(n_blocks, 12)
    packed = PQ(4, 20).encode(weight)
    before, codebook = packed.indices().clone(), packed.codebook.clone()
    moved, mask = torch.randn(n_blocks, 12), torch.rand(n_blocks, 3) < 0.3
    packed.follow(moved, mask)
    brute = squared_distances(moved.view(-1, 4).numpy(), codebook.float().numpy()).argmin(1).reshape(n_blocks, 3)
    np.testing.assert_array_equal(packed.indices(), np.where(mask, brute, before))
    assert torch.equal(packed.codebook, codebook)
    packed.follow(torch.randn(n_blocks, 12), torch.zeros_like(mask))
    np.testing.assert_array_equal(packed.indices(), np.where(mask, brute, before))


def test_follow_of_a_bfloat16_weight():
    packed = PQ(4, 20).encode(torch.randn(32, 16).bfloat16())
    moved = torch.randn(32, 16).bfloat16()
    packed.follow(moved, torch.ones(32, 4, dtype=torch.bool))
    brute = squared_distances(moved.float().view(-1, 4).numpy(), packed.codebook.float().numpy()).argmin(1)
    np.testing.assert_array_equal(packed.indices().flatten(), brute)


def test_embedding_decodes_the_rows_asked_for():
    packed = PQ(4, 20).encode(torch.randn(30, 16))
    for ids in (torch.tensor([3, 3, 29]), torch.randint(0, 30, (2, 5)), torch.empty(0, 4, dtype=torch.long)):
        assert torch.equal(packed.embedding(ids), packed.decode()[ids])
    with pytest.raises(IndexError):
        packed.embedding(torch.tensor([30]))


def test_seed_and_global_state():
    weight, state = torch.randn(64, 64), torch.get_rng_state()
    assert torch.equal(PQ(8, 16).encode(weight).codebook, PQ(8, 16).encode(weight).codebook)
    assert not torch.equal(PQ(8, 16).encode(weight).codebook, PQ(8, 16, seed=1).encode(weight).codebook)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_distances_are_noticed(monkeypatch):
    """The check against brute force above fails where codes are wrong."""
    monkeypatch.setattr(product, "nearest", lambda points, codebook: torch.zeros(len(points), dtype=torch.long))
    with pytest.raises(AssertionError):
        test_every_block_has_its_nearest_codeword()


@pytest.mark.parametrize(
    "options",
    [{"block_size": 0}, {"n_centroids": 1}, {"n_centroids": 65537}, {"codebook_dtype": "int8"}, {"n_iter": 0}],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="PQ expects"):
        PQ(**options)


def test_block_size_that_does_not_divide_names_the_remedy():
    with pytest.raises(ValueError, match=r"PQ\(block_size=8\) cannot cut rows of 50 .*pick one of \[2, 5, 10, 25\]"):
        PQ(8).encode(torch.randn(4, 50))
    with pytest.raises(ValueError, match="no small divisor"):
        PQ(8).empty((4, 67))


@pytest.mark.parametrize("shape, k", [((4, 8), 4), ((512, 8), 256), ((1, 16), 2)])
def test_adapt_never_has_more_codewords_than_blocks(shape, k):
    assert PQ(8, 256).adapt(shape).n_centroids == k
    with pytest.raises(ValueError, match="only 1 block"):
        PQ(8).adapt((1, 8))
