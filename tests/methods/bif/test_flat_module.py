"""A module as a function of its flat weights: dtypes, tied and frozen parameters, gradients against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.flat_module import FlatModule


def loss(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


BATCH = (torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 3)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.two(self.frozen(self.one(x).tanh())).tanh())
        return out


def test_gradients_and_jacobian_are_autograds() -> None:
    model = Tied().double()
    batch = (BATCH[0].double(), BATCH[1])
    flat = FlatModule(model)
    parameters = [p for p in model.parameters() if p.requires_grad]  # the tied weight once
    assert len(flat.weights) == sum(p.numel() for p in parameters)
    rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in loss(model, batch)]
    explicit = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in rows])
    assert torch.allclose(flat.jacobian(flat.weights, loss, batch), explicit)
    points = torch.stack([flat.weights, flat.weights])
    assert torch.allclose(flat.gradients(points, loss, batch), explicit.mean(0).expand(2, -1))
    directions = torch.randn(3, len(flat.weights), dtype=torch.float64)
    assert torch.allclose(flat.products(directions, loss, batch), directions @ explicit.T)
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_a_dimension() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.scale.exp()

    model = Scaled()
    flat = FlatModule(model)
    grads = torch.autograd.grad(loss(model, BATCH).mean(), list(model.parameters()))
    explicit = torch.cat([g.flatten() for g in grads])
    assert torch.allclose(flat.gradients(flat.weights[None], loss, BATCH)[0], explicit, atol=1e-6)
    assert torch.allclose(flat.jacobian(flat.weights, loss, BATCH).mean(0), explicit, atol=1e-6)
    with pytest.raises(InfluenceError, match="no parameter of Linear requires a gradient"):
        FlatModule(nn.Linear(2, 2).requires_grad_(False))


def test_values_at_other_weights_are_those_of_a_module_with_them() -> None:
    model = Tied()
    flat = FlatModule(model)
    point = flat.weights + 0.1 * torch.randn(len(flat.weights))
    found = flat.values(point[None], loss, BATCH)[0]
    torch.testing.assert_close(flat.values(flat.weights[None], loss, BATCH)[0], loss(model, BATCH).detach())
    torch.nn.utils.vector_to_parameters(point, (p for p in model.parameters() if p.requires_grad))
    assert torch.allclose(found, loss(model, BATCH), atol=1e-6)


def test_half_precision_modules_have_float32_weights_and_losses() -> None:
    model = nn.Linear(4, 3).bfloat16()
    flat = FlatModule(model)
    assert flat.weights.dtype == torch.float32 and model.weight.dtype == torch.bfloat16
    batch = (BATCH[0].bfloat16(), BATCH[1])
    assert flat.values(flat.weights[None], loss, batch).dtype == torch.float32
    assert flat.gradients(flat.weights[None], loss, batch).dtype == torch.float32


def test_an_error_of_the_users_is_not_taken_for_vmaps() -> None:
    flat = FlatModule(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="99"):
        flat.values(flat.weights[None], lambda module, batch: module(torch.zeros(2, 99)), BATCH)
    assert not flat.notes


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out.mean(1)


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_fused_attention_is_batched_and_has_forward_derivatives() -> None:
    torch.manual_seed(0)
    model, batch = Attends(), (torch.randn(5, 6, 8), torch.arange(5) % 3)
    flat = FlatModule(model)
    rows = flat.jacobian(flat.weights, loss, batch)
    directions = torch.randn(3, len(flat.weights))
    assert torch.allclose(flat.products(directions, loss, batch), directions @ rows.T, atol=1e-5)
    assert torch.allclose(flat.gradients(flat.weights[None], loss, batch)[0], rows.mean(0), atol=1e-6)
    assert not flat.notes
