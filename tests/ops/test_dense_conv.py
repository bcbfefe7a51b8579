"""Small convolutions in floats, against `F.conv2d` in float64."""

import pytest
import torch
import torch.nn.functional as F

from lightning_qnoise.ops import (
    dense_conv2d,
    dense_layout,
    pixelwise_conv2d,
    prepare_dense_conv2d,
    unfolded_conv2d,
)

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
each_bias = pytest.mark.parametrize("with_bias", [False, True])


def close_to_conv2d(found, x, weight, bias, *geometry):
    expected = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *geometry)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert found.is_contiguous(memory_format=LAYOUTS[is_last])


@each_bias
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 5, 7, 9), (3, 16, 4, 4), (16, 8, 12, 10), (4, 1, 6, 6)], ids=str)
def test_kernels_of_one_pixel(sizes, stride, with_bias):
    weight, bias = torch.randn(6, sizes[1], 1, 1), torch.randn(6) if with_bias else None
    for layout in LAYOUTS:
        x = torch.randn(sizes).contiguous(memory_format=layout)
        close_to_conv2d(pixelwise_conv2d(x, weight, bias, stride), x, weight, bias, stride)


@each_bias
@pytest.mark.parametrize(
    ("sizes", "shape", "geometry"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), ((1, 1), (0, 0))),
        ((2, 5, 7, 9), (3, 5, 3, 2), ((2, 1), (1, 0))),
        ((16, 1, 8, 8), (32, 1, 3, 3), ((1, 1), (1, 1))),
        ((2, 64, 4, 4), (96, 64, 3, 3), ((2, 2), (1, 1))),
    ],
    ids=str,
)
@torch.no_grad()
def test_patches_are_unfolded(sizes, shape, geometry, with_bias):
    weight, bias = torch.randn(shape), torch.randn(shape[0]) if with_bias else None
    for layout in LAYOUTS:
        for kernels in LAYOUTS:
            x = torch.randn(sizes).contiguous(memory_format=layout)
            found = unfolded_conv2d(x, weight.contiguous(memory_format=kernels), bias, *geometry)
            if layout is torch.contiguous_format or kernels is torch.channels_last:
                close_to_conv2d(found, x, weight, bias, *geometry)
            else:
                close_to_conv2d(found.contiguous(), x.contiguous(), weight, bias, *geometry)


@onednn
@each_bias
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
    for layout in LAYOUTS:
        x = torch.randn(sizes).contiguous(memory_format=layout)
        close_to_conv2d(dense_conv2d(x, kernel, bias, *geometry), x, weight, bias, *geometry)


@onednn
def test_other_sizes_are_refused():
    geometry = (1, 1), (0, 0), (1, 1)
    kernel = prepare_dense_conv2d(torch.randn(2, 3, 1, 1), torch.Size([4, 3, 5, 5]), *geometry)
    with pytest.raises(ValueError, match=r"packed for images \[4, 3, 5, 5\], got \[2, 3, 5, 5\]"):
        dense_conv2d(torch.randn(2, 3, 5, 5), kernel, None, *geometry)


@onednn
@pytest.mark.parametrize(
    ("sizes", "shape", "geometry", "layout"),
    [
        ((1, 512, 7, 7), (512, 512, 3, 3), ((1, 1), (1, 1)), "packed"),
        ((16, 96, 2, 2), (96, 96, 3, 3), ((1, 1), (1, 1)), "packed"),
        ((1, 96, 2, 2), (96, 96, 3, 3), ((1, 1), (1, 1)), "channels-last"),  # packed takes longer to start
        ((2, 96, 2, 2), (96, 96, 3, 3), ((1, 1), (1, 1)), "channels-last"),
        ((1, 32, 16, 16), (64, 32, 3, 3), ((2, 2),), "channels-last"),
        ((1, 32, 16, 16), (64, 32, 3, 3), ((2, 2), (1, 1), (2, 2)), "contiguous"),
        ((1, 32, 16, 16), (64, 32, 3, 3), (), "contiguous"),
        ((1, 3, 8, 8), (64, 3, 3, 3), (), "contiguous"),
        ((8, 3, 8, 8), (64, 3, 3, 3), (), "unfolded"),
        ((8, 3, 8, 8), (64, 3, 3, 3), ((1, 1), (2, 2), (2, 2)), "contiguous"),
        ((64, 3, 32, 32), (64, 3, 3, 3), (), "contiguous"),
        ((1, 512, 7, 7), (2048, 512, 1, 1), (), "channels-last"),  # a plain product
        ((16, 32, 8, 8), (64, 32, 1, 1), ((2, 2),), "pixelwise"),
        ((16, 32, 8, 8), (64, 32, 1, 1), ((2, 2), (1, 1)), "contiguous"),
        ((64, 64, 56, 56), (64, 64, 3, 3), (), "contiguous"),
        ((16, 96, 2, 2), (96, 96, 3, 3), (), "contiguous"),  # which fits nowhere
        ((8, 4, 8, 8), (64, 3, 3, 3), (), "contiguous"),  # nor does this
        ((2, 1, 2, 2), (8, 1, 3, 3), ((1, 1), (200, 200)), "contiguous"),
    ],
)
def test_the_layout_follows_the_shape(sizes, shape, geometry, layout):
    assert dense_layout(torch.Size(sizes), torch.Size(shape), *geometry) == layout
