"""Adam's rate against an average of squared gradients kept by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from ine_callback.optimizers.registry import rate_of


# Adam's coupled weight decay enters its average: see the next test
@pytest.mark.parametrize(("kind", "steps"), [(AdamW, 0), (AdamW, 1), (AdamW, 7), (Adam, 0)])
def test_adams_rate_is_one_over_the_blocks_rms_gradient(kind: type[Optimizer], steps: int) -> None:
    """1 / (rms of the bias-corrected root of v + eps), from an average kept by hand."""
    weight, bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))
    optimizer = kind([weight, bias], lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    v = [torch.zeros(3, 2), torch.zeros(3)]
    for _ in range(steps):
        for k, p in enumerate((weight, bias)):
            p.grad = torch.randn_like(p)
            v[k] = 0.9 * v[k] + 0.1 * p.grad.square()
        optimizer.step()
    if steps:
        flat = torch.cat([x.flatten() for x in v]) / (1 - 0.9**steps)
    else:  # before the first step the present gradient stands in
        weight.grad, bias.grad = torch.randn(3, 2), torch.randn(3)
        flat = torch.cat([weight.grad.flatten(), bias.grad]).square()
    scale = 1 / (flat.mean().sqrt() + 1e-3)
    rate = rate_of(optimizer, [weight, bias])
    torch.testing.assert_close(torch.as_tensor(rate.curvature), scale, rtol=1e-5, atol=0)
    assert rate.step == rate.lr == 0.01
    expected = 0.2 * scale if kind is Adam else torch.tensor(0.2)
    torch.testing.assert_close(torch.as_tensor(rate.decay), expected, rtol=1e-5, atol=0)


def test_adam_with_coupled_decay_uses_the_optimizers_own_average() -> None:
    p = nn.Parameter(torch.randn(4))
    optimizer = Adam([p], lr=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    v = torch.zeros(4)
    for _ in range(5):
        p.grad = torch.randn(4)
        v = 0.9 * v + 0.1 * (p.grad + 0.2 * p.detach()).square()
        optimizer.step()
    scale = 1 / ((v / (1 - 0.9**5)).mean().sqrt() + 1e-8)
    torch.testing.assert_close(rate_of(optimizer, [p]).curvature, scale, rtol=1e-5, atol=0)


def test_adam_without_any_gradient_has_no_curvature() -> None:
    p = nn.Parameter(torch.zeros(2))
    assert rate_of(Adam([p]), [p]).curvature == 0.0
