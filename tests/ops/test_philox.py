import numpy as np
import pytest
import torch

from lightning_qnoise.ops.philox import philox, philox_mask

KNOWN = {  # of Random123, philox4x32 with ten rounds: counter, key, result
    "zeros": (["00000000"] * 4, ["00000000"] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": (["ffffffff"] * 4, ["ffffffff"] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        ["243f6a88", "85a308d3", "13198a2e", "03707344"],
        ["a4093822", "299f31d0"],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}
SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 6917529027641081856]


def by_hand(counter, key):
    """The same from the paper, on Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def mask_by_hand(seed, rate, rows, blocks):
    key = divmod(seed % 2**64, 2**32)[::-1]
    threshold = int(min(max(float(rate), 0.0), 1.0) * 2**24)
    words = [[by_hand([b // 4, r, 0, 0], key)[b % 4] for b in range(blocks)] for r in range(rows)]
    return np.array(words, dtype=np.uint64).reshape(rows, blocks) // 256 < threshold


def draw(seed=0, rate=0.5, rows=64, blocks=1024):
    return philox_mask(torch.tensor([seed]), torch.tensor(rate), rows, blocks)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN.values(), ids=KNOWN)
def test_known_answers(counter, key, expected):
    words = philox(*([torch.tensor(int(word, 16)) for word in part] for part in (counter, key)))
    assert " ".join(f"{word.item():08x}" for word in words) == expected
    assert [int(word) for word in words] == by_hand(*([int(word, 16) for word in part] for part in (counter, key)))


def test_many_counters_at_once():
    counter = [torch.randint(2**32, (3, 1)), torch.randint(2**32, (5,)), *torch.randint(2**32, (2,))]
    key = torch.randint(2**32, (2,)).unbind()
    words = torch.stack(philox(counter, key), dim=-1)
    assert words.shape == (3, 5, 4) and words.dtype == torch.int64
    for i in range(3):
        for j in range(5):
            one = [int(counter[0][i, 0]), int(counter[1][j]), int(counter[2]), int(counter[3])]
            assert words[i, j].tolist() == by_hand(one, [int(k) for k in key])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 4), (2, 7), (5, 9), (0, 3), (3, 0)])
def test_a_mask_is_what_its_docstring_says(seed, rows, blocks):
    mask = draw(seed, 0.3, rows, blocks)
    assert mask.dtype == torch.bool and mask.shape == (rows, blocks)
    assert np.array_equal(mask.numpy(), mask_by_hand(seed, np.float32(0.3), rows, blocks))


def test_a_mask_of_fewer_rows_and_blocks_is_a_part_of_it():
    assert torch.equal(draw(3, 0.3, 5, 6), draw(3, 0.3, 9, 11)[:5, :6])


@pytest.mark.parametrize("rate", [-1.0, 0.0, 2**-25, 1.0, 1.5, float("inf")])
def test_none_up_to_zero_and_all_from_one_on(rate):
    assert bool((draw(rate=rate) == (rate >= 1)).all())


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_blocks_are_chosen_at_the_rate(rate):
    for seed in (0, 1, 2**40):
        mask = draw(seed, rate, 500, 2000)
        n, chosen = mask.numel(), int(mask.sum())
        assert abs(chosen - n * rate) < 4 * (n * rate * (1 - rate)) ** 0.5


def test_every_row_and_every_column_is_chosen_at_the_rate():
    mask = draw(7, 0.3, 1000, 1000).double()
    for sums in (mask.sum(dim=0), mask.sum(dim=1)):  # 1000 of each: 4.5 sigma
        assert (sums - 300).abs().max() < 4.5 * 210**0.5
        assert sums.var().item() == pytest.approx(210, rel=0.2)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_and_seeds_are_independent(rate):
    mask = draw(11, rate, 1000, 1000).double() - rate
    pairs = {f"next {i}": (mask[:, i:], mask[:, :-i]) for i in (1, 2, 3, 4, 8)}
    pairs |= {"row below": (mask[1:], mask[:-1]), "transposed": (mask.triu(1), mask.t().triu(1))}
    for seed in (12, 10, 11 + 2**32, -11, 11 + 2**63 - 2**64):
        pairs[f"seed {seed}"] = mask, draw(seed, rate, 1000, 1000).double() - rate
    for name, (a, b) in pairs.items():
        correlation = (a * b).mean() / (rate * (1 - rate))
        assert abs(correlation) < 4 * a.numel() ** -0.5, name
