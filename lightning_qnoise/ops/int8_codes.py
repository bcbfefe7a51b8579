"""What enters a product of integers: a byte for each number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# Added to a float32 below 2**22, it leaves no room for a fraction: the sum is rounded, halves to the even number, and
# the lowest byte of its bits is that of the whole number.
_NO_FRACTION = 1.5 * 2**23


def byte_codes(x: Tensor, scale: Tensor, offset: Tensor | int, bits: int = 8, middle: int = 128) -> Tensor:
    """Return the codes of an input less `middle`.

    On CPUs an input of one scale and one zero point that is a number takes half of the passes: it is multiplied by
    `1 / scale` and rounded at once. Others are divided by the scale, as in `affine_steps`; the two can differ by one
    where a number lies within a rounding error of the middle between two levels (of random numbers one in 200,000).

    Args:
        x: Float, of one or more dimensions, not empty.
        scale: float32, `[]` for all of `x`, or one per entry of its first dimension, `[n, 1, ...]`.
        offset: The zero point less `middle`, whole numbers: float32 of the shape of `scale`, or one number.
        bits: Bits per code, at most 8.
        middle: What the codes are less by.

    Returns:
        int8 in the layout of `x`: the lowest byte of `code - middle`.

    Example:
        >>> byte_codes(torch.tensor([[-1.0, 0.4, 9.0]]), torch.tensor(1.0), -1, bits=3, middle=4)
        tensor([[-2, -1,  3]], dtype=torch.int8)
    """
    top = 2**bits - 1
    if x.is_cpu and isinstance(offset, int) and not scale.ndim:
        shift = offset % 2  # what is added before is even, as halves would go to the odd number otherwise
        least = _NO_FRACTION - middle - shift
        codes = torch.add(_rounder(offset - shift), x.float(), alpha=1 / scale.item()).clamp_(least, least + top)
        codes = codes.view(torch.int32).to(torch.int8)
    else:
        codes, shift = (x.float() / scale).round_(), 128 - middle  # and only then the zero point, as `affine_steps`
        offset = offset - shift if shift else offset
        codes = (codes.add_(offset) if isinstance(offset, Tensor) or offset else codes).clamp_(-128, top - 128)
        codes = codes.to(torch.int8)
    return codes.add_((shift + 128) % 256 - 128) if shift else codes


@lru_cache
def _rounder(offset: int) -> Tensor:
    return torch.tensor(_NO_FRACTION + offset, dtype=torch.float32, device="cpu")


def quantized_images(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int, border: Sequence[int] = (0, 0, 0, 0)
) -> Tensor:
    """Return the codes of images, uint8, channels last, with codes of zero around them.

    Args:
        x: Float `[n, channels, height, width]`, not empty.
        scale: float32, `[]` for all of `x`, or one per image, `[n, 1, 1, 1]`.
        zero_point: Whole numbers: float32 of the shape of `scale`, or one number.
        bits: Bits per code, at most 8.
        border: How many are put on the left, on the right, above and below.

    Example:
        >>> quantized_images(torch.tensor([[[[-1.0, 0.6]]]]), torch.tensor(1.0), 2, 8, (0, 1, 0, 0))
        tensor([[[[1, 3, 2]]]], dtype=torch.uint8)
    """
    codes = byte_codes(x, scale, zero_point, bits, middle=0).view(torch.uint8)
    if not any(border):
        return codes.contiguous(memory_format=torch.channels_last)
    left, right, above, below = border
    n, channels, height, width = codes.shape
    sizes = n, channels, above + height + below, left + width + right
    images = torch.empty(sizes, dtype=torch.uint8, device=codes.device, memory_format=torch.channels_last)
    images.copy_(zero_point) if isinstance(zero_point, Tensor) else images.fill_(zero_point)
    images[:, :, above : above + height, left : left + width].copy_(codes)
    return images
