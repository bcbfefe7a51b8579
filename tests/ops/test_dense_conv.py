"""Convolutions with a weight that oneDNN has packed, against `F.conv2d`."""

import pytest
import torch
import torch.nn.functional as F

from lightning_qnoise.ops import dense_conv2d, dense_layout, prepare_dense_conv2d

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("sizes", "shape", "geometry"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), ((1, 1), (0, 0), (1, 1))),
        ((2, 5, 7, 9), (3, 5, 3, 2), ((2, 1), (1, 0), (1, 1))),
        ((3, 16, 8, 8), (40, 16, 3, 3), ((1, 1), (1, 1), (1, 1))),
        ((16, 96, 2, 2), (96, 96, 3, 3), ((1, 1), (1, 1), (1, 1))),
        ((2, 4, 12, 11), (6, 4, 3, 3), ((1, 2), (2, 3), (2, 3))),
    ],
    ids=str,
)
@torch.no_grad()
def test_it_is_torchs_convolution(sizes, shape, geometry, with_bias):
    weight, bias = torch.randn(shape), torch.randn(shape[0]) if with_bias else None
    kernel = prepare_dense_conv2d(weight, torch.Size(sizes), *geometry)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(sizes).contiguous(memory_format=layout)
        expected = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *geometry)
        found = dense_conv2d(x, kernel, bias, *geometry)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
        assert found.is_contiguous(memory_format=layout)


def test_other_sizes_are_refused():
    geometry = (1, 1), (0, 0), (1, 1)
    kernel = prepare_dense_conv2d(torch.randn(2, 3, 1, 1), torch.Size([4, 3, 5, 5]), *geometry)
    with pytest.raises(ValueError, match=r"packed for images \[4, 3, 5, 5\], got \[2, 3, 5, 5\]"):
        dense_conv2d(torch.randn(2, 3, 5, 5), kernel, None, *geometry)


@pytest.mark.parametrize(
    ("sizes", "shape", "stride", "layout"),
    [
        ((1, 512, 7, 7), (512, 512, 3, 3), (1, 1), "packed"),
        ((16, 96, 2, 2), (96, 96, 3, 3), (1, 1), "packed"),
        ((1, 96, 2, 2), (96, 96, 3, 3), (1, 1), "channels-last"),  # packed takes longer to start
        ((1, 32, 16, 16), (64, 32, 3, 3), (2, 2), "channels-last"),
        ((1, 32, 16, 16), (64, 32, 3, 3), (1, 1), "contiguous"),
        ((1, 3, 8, 8), (64, 3, 3, 3), (1, 1), "contiguous"),
        ((1, 512, 7, 7), (2048, 512, 1, 1), (1, 1), "channels-last"),  # a plain product
        ((64, 64, 56, 56), (64, 64, 3, 3), (1, 1), "contiguous"),
    ],
)
def test_the_layout_follows_the_shape(sizes, shape, stride, layout):
    assert dense_layout(torch.Size(sizes), torch.Size(shape), stride) == layout
