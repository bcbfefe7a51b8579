"""Learned scales against autograd through the same arithmetic with straight-through rounding."""

import pytest
import torch
from torch import nn

from lightning_qnoise import Int
from lightning_qnoise.learned_scale import LearnedScale


class Round(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(
    "scheme", [Int(b, g, s, "lsq") for b in (2, 4) for g in ("channel", "group:6") for s in (0, 1)]
)
def test_gradients_and_a_step(scheme):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 12))
    start, slope = weight.detach().clone(), torch.randn(5, 12)
    packed = scheme.encode(weight)
    first, zeros, levels = packed.scale.clone(), packed.zeros.clone()[..., None], 2**scheme.bits - 1
    held = LearnedScale(weight, packed)
    held.start()

    latent, log = start.clone().requires_grad_(), torch.zeros_like(first, requires_grad=True)
    scale = (first * log.exp())[..., None]
    codes = Round.apply((latent.view(*first.shape, -1) / scale + zeros).clamp(0, levels))
    shown = ((codes - zeros) * scale).view(5, 12)
    torch.testing.assert_close(weight.detach(), shown.detach())
    (shown * slope).sum().backward()
    assert (latent.grad == 0).any() and (latent.grad != 0).any()

    (weight * slope).sum().backward()
    held.before_step()
    shared = (start.numel() / first.numel() * (levels // 2)) ** -0.5
    torch.testing.assert_close(held.codebook.grad, log.grad * shared, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, latent.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.detach(), start)

    torch.optim.SGD([weight, held.codebook], lr=0.1).step()
    held.after_step()
    torch.testing.assert_close(held.latent, start - 0.1 * latent.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.scale, first * (-0.1 * log.grad * shared).exp(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(held.pack().decode(), weight.detach())

    other = LearnedScale(nn.Parameter(start.clone()), scheme.encode(torch.randn(5, 12)))
    other.load_state_dict(held.state_dict())
    assert torch.equal(other.parameter, weight)
