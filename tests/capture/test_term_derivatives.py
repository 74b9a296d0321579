"""Derivatives of every term's loss along a direction, against explicit gradients of each term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.term_derivatives import term_derivatives
from ine_callback.errors import InfluenceError
from tests.helpers.contexts import Tied, choices

ROWS, TOKENS, WORDS = 3, 5, 7
IDS = choices(WORDS, ROWS, TOKENS)
TARGETS = IDS.roll(1, 1).masked_fill(torch.arange(TOKENS) > torch.tensor([[4], [2], [3]]), -100)


class Attention(nn.Module):
    """A causal language model with fused attention, which has no forward mode of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(WORDS, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.head = nn.Linear(8, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=torch.float64)
        return self.head(self.layer(self.words(ids), src_mask=causal, is_causal=True))


class Halved(torch.autograd.Function):
    """Has a backward pass and no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh().square()) / 2


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(Halved.apply(self.words(ids)))


def flat(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())


def by_class(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.mT, TARGETS, weight=torch.linspace(0.5, 2, WORDS).double()) * 3


def masked(logits: Tensor) -> Tensor:
    mask = (TARGETS >= 0).double()
    losses = F.cross_entropy(logits.flatten(0, 1), TARGETS.clamp_min(0).flatten(), reduction="none")
    return (losses.view(ROWS, TOKENS) * mask).sum() / mask.sum()


def explicit(module: nn.Module, direction: dict[nn.Parameter, Tensor]) -> Tensor:
    """<x, grad l_ij> by one backward pass for each term."""
    out = torch.zeros(ROWS, TOKENS).double()
    logits = module(IDS)
    for i in range(ROWS):
        for j in range(TOKENS):
            loss = F.cross_entropy(logits[i, j], TARGETS[i, j].clamp_min(0))
            found = torch.autograd.grad(loss, list(direction), retain_graph=True, allow_unused=True)
            out[i, j] = sum((g * x).sum() for g, x in zip(found, direction.values(), strict=True) if g is not None)
    return out


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[nn.Parameter, Tensor]]:
    torch.manual_seed(3)
    module = make().double().eval()
    return module, {p: torch.randn_like(p) for p in module.parameters()}


@pytest.mark.parametrize("loss", [flat, by_class, masked])
@pytest.mark.parametrize("make", [Attention, Tied, Own])
def test_every_term_has_the_derivative_of_its_own_gradient(
    make: Callable[[], nn.Module], loss: Callable[[Tensor], Tensor]
) -> None:
    module, direction = made(make)
    before = {name: p.clone() for name, p in module.named_parameters()}
    reading, found = term_derivatives(module, lambda: loss(module(IDS)), direction, ROWS)
    counted = reading.weights != 0
    assert torch.equal(counted, TARGETS >= 0)
    # Own leaves a central difference
    tolerance = 1e-8 if make is Own else 1e-12
    assert torch.allclose(found[counted], explicit(module, direction)[counted], rtol=tolerance, atol=tolerance)
    assert all(torch.equal(p, before[name]) and p.is_leaf for name, p in module.named_parameters())


def test_coefficients_and_derivatives_add_up_to_the_loss_s_own() -> None:
    module, direction = made(Attention)
    reading, found = term_derivatives(module, lambda: by_class(module(IDS)), direction, ROWS)
    grads = torch.autograd.grad(by_class(module(IDS)), list(direction))
    wanted = sum((g * x).sum() for g, x in zip(grads, direction.values(), strict=True))
    total = (found * reading.weights / reading.terms).sum()
    assert abs(float(total - wanted)) < 1e-12 * abs(float(wanted))


def test_a_part_of_the_parameters_alone_can_be_moved() -> None:
    module, direction = made(Attention)
    some = {p: x for p, x in direction.items() if p is module.head.weight}  # type: ignore[attr-defined]
    _, found = term_derivatives(module, lambda: flat(module(IDS)), some, ROWS)
    counted = TARGETS >= 0
    assert torch.allclose(found[counted], explicit(module, some)[counted], rtol=1e-12, atol=1e-12)


def test_a_loss_whose_terms_cannot_be_read_is_refused_and_the_module_is_as_before() -> None:
    module, direction = made(Attention)
    with pytest.raises(InfluenceError, match="terms can be read"):
        term_derivatives(module, lambda: module(IDS).square().logsumexp(-1).mean(), direction, ROWS)
    assert all(isinstance(p, nn.Parameter) for p in module.head._parameters.values())  # type: ignore[attr-defined]


def test_an_error_of_the_module_s_own_is_not_taken_for_a_missing_forward_mode() -> None:
    module, direction = made(Attention)
    calls = []

    def broken() -> Tensor:
        calls.append(1)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        term_derivatives(module, broken, direction, ROWS)
    assert len(calls) == 1
