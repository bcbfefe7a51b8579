"""What `fake_quant_noise` computes, with torch alone, and what it refuses; the arguments are those of the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qnoise.ops.affine import affine_steps
from lightning_qnoise.ops.philox import philox_mask


def check(
    weight: Tensor,
    seed: Tensor,
    rate: Tensor,
    unit: int,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bits: int,
    codes: Tensor | None,
    table: Tensor | None,
    clamp: bool,
) -> None:
    """Raise a ValueError where the arguments of the operator do not fit."""
    if weight.ndim < 2 or not weight.is_floating_point():
        raise ValueError(f"expected a float weight of two or more dimensions, got {weight.dtype} {list(weight.shape)}")
    if seed.dtype != torch.int64 or seed.shape != (1,) or rate.dtype != torch.float32 or rate.shape != ():
        got = f"{seed.dtype} {list(seed.shape)} and {rate.dtype} {list(rate.shape)}"
        raise ValueError(f"expected a seed int64 [1] and a rate float32 [], got {got}")
    rows, cols = weight.shape[0], weight.shape[1:].numel()
    if unit < 1 or cols % unit:
        raise ValueError(f"rows of {cols} elements cannot be cut into blocks of {unit}")
    if scale is not None and (table is not None or codes is not None or unit != 1):
        raise ValueError("a scale is of single elements: leave codes and table out, and unit at 1")
    if scale is None and (zero_point is not None or clamp):
        raise ValueError("zero_point and clamp go with a scale, which is missing")
    if scale is not None:
        _check_scale(rows, cols, scale, zero_point, bits)
    if table is None and codes is not None:
        raise ValueError("codes go with a table, which is missing")
    if table is not None and (table.shape[1:] != (unit,) or (codes is None and len(table) != 1)):
        raise ValueError(f"expected a table [{'1' if codes is None else 'K'}, {unit}], got {list(table.shape)}")
    if codes is not None and (codes.is_floating_point() or codes.shape != (rows, cols // unit)):
        raise ValueError(f"expected integer codes {[rows, cols // unit]}, got {codes.dtype} {list(codes.shape)}")


def _check_scale(rows: int, cols: int, scale: Tensor, zero_point: Tensor | None, bits: int) -> None:
    cut = scale.shape[1] if scale.ndim == 2 else 0
    if scale.dtype != torch.float32 or not cut or cols % cut or (len(scale) != rows and scale.shape != (1, 1)):
        got = f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"expected a scale float32 [{rows}, groups] or [1, 1], groups a divisor of {cols}, got {got}")
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(f"expected a zero point {list(scale.shape)}, as the scale, got {list(zero_point.shape)}")
    if not 1 <= bits <= 16:
        raise ValueError(f"expected 1 to 16 bits, got {bits}")


def _grid(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weight, its scales and its zero points: `[rows, groups, size]`, float32 `[rows, groups, 1]` twice."""
    zero = torch.full_like(scale, 2 ** (bits - 1)) if zero_point is None else zero_point.float()
    return weight.reshape(*scale.shape, weight.numel() // scale.numel()), scale[..., None], zero[..., None]


def _ends(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = ((code - zero) * scale for code in (0, 2**bits - 1))
    return low.to(weight.dtype), high.to(weight.dtype)


def clamped(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the weight cut to the range of the integers, with the gradient of `torch.clamp`."""
    value, step, zero = _grid(weight, scale, zero_point, bits)
    return value.clamp(*_ends(value, step, zero, bits)).reshape(weight.shape)


def noise(
    weight: Tensor,
    seed: Tensor,
    rate: Tensor,
    unit: int,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bits: int,
    codes: Tensor | None,
    table: Tensor | None,
    clamp: bool,
) -> Tensor:
    """Return the noisy weight."""
    check(weight, seed, rate, unit, scale, zero_point, bits, codes, table, clamp)
    if not weight.numel():
        return torch.empty_like(weight)
    shape = weight.shape[0], weight.shape[1:].numel() // unit, unit
    value, noisy = weight, weight.new_zeros(())
    if scale is not None:
        value = clamped(weight, scale, zero_point, bits) if clamp else weight
        grouped, step, zero = _grid(value, scale, zero_point, bits)
        noisy = (affine_steps(grouped, step, zero, bits) * step).to(weight.dtype).reshape(shape)
    elif table is not None:
        noisy = table.to(weight.dtype)[0 if codes is None else codes.long()]
    mask = philox_mask(seed, rate, *shape[:2])[..., None]
    return torch.empty_like(weight).copy_(torch.where(mask, noisy, value.reshape(shape)).view(weight.shape))


def noise_grad(grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return the gradient where the weight is within the range, and zero elsewhere."""
    if not weight.numel():
        return torch.empty_like(weight)
    value, step, zero = _grid(weight, scale, zero_point, bits)
    low, high = _ends(value, step, zero, bits)
    kept = ((value >= low) & (value <= high)).reshape(weight.shape)
    return torch.empty_like(weight).copy_(torch.where(kept, grad, 0))
