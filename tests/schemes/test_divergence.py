"""The entropy calibration against a plain loop over levels, and on the ReLU activations that once broke it."""

import copy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lightning_qnoise import Int, quantize
from lightning_qnoise.schemes import Observer, ranges
from lightning_qnoise.schemes.divergence import _divergence, least_divergence
from lightning_qnoise.schemes.ranges import affine_grid, find_range, round_trip


def divergences(histogram, n_levels, fix_zero_bin=True, fold_q=False):
    """Number of kept bins -> divergence of Q from P (Migacz 2017), one level after another in float64."""
    counts = np.asarray(histogram).astype(np.float64)
    if fix_zero_bin:
        counts[0] = counts[1]
    found = {}
    for size in [*range(max(128, n_levels), len(counts), 16), len(counts)]:
        p, q = counts[:size].copy(), np.zeros(size)
        p[-1] += counts[size:].sum()
        told = p if fold_q else counts[:size]
        edges = [-(-level * size // n_levels) for level in range(n_levels + 1)]
        for start, stop in pairwise(edges):
            inside = told[start:stop]
            if inside.any():
                q[start:stop][inside > 0] = inside.sum() / (inside > 0).sum()
        if q.any():  # otherwise nothing is left to tell of: no candidate
            p, q = p / p.sum(), q / q.sum()
            found[size] = float((p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-12))).sum())
    return found


def histogram_of(values, n_bins=2048):
    return torch.histc(values.abs(), n_bins, 0, values.abs().max().item())


HISTOGRAMS = {
    "normal": lambda: histogram_of(torch.randn(40_000)),
    "laplace": lambda: histogram_of(torch.distributions.Laplace(0, 1).sample((40_000,))),
    "relu": lambda: histogram_of(torch.randn(40_000).relu()),
    "relu_tail": lambda: histogram_of(torch.randn(20_000).relu() ** 3),
    "flat_with_outlier": lambda: torch.cat([torch.full((300,), 50.0), torch.zeros(1747), torch.ones(1)]),
    "sparse": lambda: (torch.rand(2048) < 0.02).float() * torch.randint(1, 9, (2048,)),
    "far": lambda: histogram_of(torch.cat([10 + torch.randn(20_000), torch.tensor([40.0])])),
    "fewer_bins": lambda: histogram_of(torch.randn(5000), 777),
}


@pytest.mark.parametrize("n_levels", [7, 128, 256])
@pytest.mark.parametrize("make", HISTOGRAMS.values(), ids=HISTOGRAMS)
@pytest.mark.parametrize("fix_zero_bin", [True, False])
def test_kept_bins_have_the_least_divergence_of_the_plain_loop(make, n_levels, fix_zero_bin):
    histogram = make()
    kept = least_divergence(histogram[None], n_levels, fix_zero_bin)
    assert kept.shape == (1,)
    found = divergences(histogram, n_levels, fix_zero_bin)
    assert found[kept.item()] <= min(found.values()) + 2e-5  # in float32


def test_every_divergence_equals_the_plain_loop():
    histogram = torch.cat([torch.rand(512) * 9, (torch.rand(1536) < 0.03) * torch.rand(1536)]) + 0.0
    found = divergences(histogram, 128, fix_zero_bin=False)
    got = [_divergence(histogram[None], size, 128).item() for size in found]
    np.testing.assert_allclose(got, list(found.values()), rtol=1e-3, atol=1e-5)


def test_of_equal_divergences_the_most_bins_are_kept():
    counts = torch.zeros(1, 2048)
    counts[:, 1:128] = torch.arange(1.0, 128)
    assert least_divergence(counts, 128).item() == 128  # every other range merges bins that differ
    assert least_divergence(torch.ones(1, 2048), 128).item() == 2048  # flat: nothing is lost in any range
    assert least_divergence(torch.zeros(1, 2048), 128).item() == 2048


def test_rows_do_not_see_each_other():
    histograms = torch.stack([make() for name, make in HISTOGRAMS.items() if name != "fewer_bins"])
    together = least_divergence(histograms, 128)
    for row, kept in zip(histograms, together, strict=True):
        assert least_divergence(row[None], 128) == kept
    before = histograms.clone()
    least_divergence(histograms, 128)
    assert torch.equal(histograms, before)


def test_what_is_cut_off_is_folded_into_p_alone():
    """If Q had it as well, cutting would look free, and the narrowest range would win."""
    histogram = torch.zeros(2048)
    histogram[:512] = torch.linspace(100, 50, 512).round()
    histogram[512:1024] = 40.0
    right, wrong = (divergences(histogram, 128, fold_q=fold) for fold in (False, True))
    best, folded = (min(found, key=found.get) for found in (right, wrong))
    assert folded < best == least_divergence(histogram[None], 128).item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_find_range_cuts_magnitudes_at_the_least_divergence(bits, sign):
    values = torch.randn(30_000).relu() ** 2 * sign
    low, high = find_range(values, bits, False, "histogram")
    threshold = max(-low.item(), high.item())
    size = values.abs().max().item()
    found = divergences(np.histogram(values.abs().numpy(), 2048, (0, size))[0], 2**bits)
    kept = round(threshold / size * 2048)
    assert threshold == pytest.approx(kept * size / 2048, rel=1e-5)
    assert found[kept] <= min(found.values()) + 1e-3  # a value at the edge of a bin may be counted beside it
    assert min(-low.item(), high.item()) == 0


def snr(values, method, symmetric=False):
    """Of W8A8's rounding of activations, in dB."""
    scale, zero = affine_grid(*find_range(values, 8, symmetric, method), 8, symmetric)
    return 10 * (values.square().sum() / (round_trip(values, scale, zero, 8) - values).square().sum()).log10().item()


@pytest.fixture
def unfixed(monkeypatch):
    """The calibration as others have it: the zeros of a ReLU count."""

    def use():
        monkeypatch.setattr(ranges, "least_divergence", partial(least_divergence, fix_zero_bin=False))

    return use


@pytest.mark.parametrize("share", [0.75, 0.95])
def test_exact_zeros_do_not_decide_the_range(share, unfixed):
    values = torch.randn(50_000).abs()
    values[torch.rand(50_000) < share] = 0
    limit, good = find_range(values, 8, False, "histogram")[1], snr(values, "histogram")
    assert limit > 3 and good > snr(values, "minmax") - 4
    dense = find_range(values[values > 0], 8, False, "histogram")[1]
    assert limit == pytest.approx(dense.item(), rel=0.1)
    unfixed()
    assert find_range(values, 8, False, "histogram")[1] < 0.5 * limit
    assert snr(values, "histogram") < good - 10


@pytest.mark.parametrize("growth", [0.3, 0.9, 0.99])
def test_exact_zeros_do_not_decide_the_range_of_an_observer_whose_limit_has_grown(growth):
    values = torch.randn(50_000).relu()
    observer = Observer(8, False, "histogram")
    observer.update(values[values < values.max() * growth])
    observer.update(values)
    twice = torch.cat([values[values < values.max() * growth], values])
    assert observer.find_range()[1] == pytest.approx(find_range(twice, 8, False, "histogram")[1].item(), rel=0.2)


def test_a_relu_net_stays_as_accurate_as_with_minmax_and_would_collapse_without_the_fix(unfixed):
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images) / 16, torch.tensor(labels)
    train, test = (x[:1200], y[:1200]), (x[1200:].float(), y[1200:])
    torch.manual_seed(1)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        h, activity = train[0], 0.0
        for layer in model:
            h = layer(h)
            activity = activity + h.mean() * isinstance(layer, nn.ReLU)  # sparse, as those of larger nets
        optimizer.zero_grad()
        (F.cross_entropy(h, train[1]) + 0.5 * activity).backward()
        optimizer.step()
    model.float()
    logits = model(test[0]).detach()

    def quantized(method):
        """Accuracy in points, and the relative error of the logits."""
        policy = Int(8, activation=Int(8, mode="static", range=method))
        packed = quantize(copy.deepcopy(model), policy, loader=train[0].float().split(200))
        out = packed(test[0])
        return 100 * (out.argmax(1) == test[1]).float().mean().item(), ((out - logits).norm() / logits.norm()).item()

    accuracy, _ = quantized("minmax")
    assert accuracy > 80
    for method in ("histogram", "mse", "percentile"):
        got = quantized(method)
        assert got[0] > accuracy - 1 and got[1] < 0.05, method
    unfixed()
    collapsed = quantized("histogram")
    assert collapsed[0] < accuracy - 10 and collapsed[1] > 0.3
