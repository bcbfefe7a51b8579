"""What enters a product of integers: a byte for each number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def signed_input(
    x: Tensor, scale: Tensor, offset: Tensor | int | None, bits: int = 8, middle: int = 128, with_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the codes of an input less `middle`, and on demand sums.

    Args:
        x: Float, of one or more dimensions, not empty.
        scale: float32, `[]` for all of `x`, or one per entry of its first dimension, `[n, 1, ...]`.
        offset: The zero point less `middle`, whole numbers: float32 of the shape of `scale`, or one number; None is 0.
        bits: Bits per code, at most 8.
        middle: What the codes are less by, at most 128.
        with_sums: Whether to sum.

    Returns:
        int8 in the layout of `x`, and their sums over the last dimension, float32 `[..., 1]`, or None.

    Example:
        >>> signed_input(torch.tensor([[-1.0, 0.4, 9.0]]), torch.tensor(1.0), -1, bits=3, middle=4, with_sums=True)
        (tensor([[-2, -1,  3]], dtype=torch.int8), tensor([[0.]]))
    """
    codes = (x.float() / scale).round_()  # and only then the zero point, as `affine_steps` does
    if offset is not None:
        codes.add_(offset)
    codes.clamp_(-middle, 2**bits - 1 - middle)
    return codes.to(torch.int8), codes.sum(dim=-1, keepdim=True) if with_sums else None


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
    codes = signed_input(x, scale, zero_point - 128, bits)[0].view(torch.uint8)
    if not any(border):
        return codes.bitwise_xor_(128).contiguous(memory_format=torch.channels_last)
    left, right, above, below = border
    n, channels, height, width = codes.shape
    sizes = n, channels, above + height + below, left + width + right
    images = torch.empty(sizes, dtype=torch.uint8, device=codes.device, memory_format=torch.channels_last)
    images.copy_(zero_point) if isinstance(zero_point, Tensor) else images.fill_(zero_point)
    torch.bitwise_xor(codes, 128, out=images[:, :, above : above + height, left : left + width])
    return images
