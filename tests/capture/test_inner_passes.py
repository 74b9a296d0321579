"""Several backward passes in one step: what does not stay in ``grad`` does not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.kept_steps import Net, check, recorded


class Adversarial(Net):
    """Inner passes in the training step, in some of the steps; ``kind`` says how."""

    kind, first = "", 1

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        if index >= self.first:
            x = x + 0.1 * getattr(self, self.kind)(x, y)
        return self.differentiate(x, y)

    def _leaf(self, x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()

    def thrown_away(self, x: Tensor, y: Tensor) -> Tensor:
        leaf = self._leaf(x)
        F.cross_entropy(self(leaf), y).backward()
        self.zero_grad()
        assert leaf.grad is not None
        return leaf.grad.sign()

    def zeroed(self, x: Tensor, y: Tensor) -> Tensor:
        leaf = self._leaf(x)
        F.cross_entropy(self(leaf), y).backward()
        self.zero_grad(set_to_none=False)
        assert leaf.grad is not None
        return leaf.grad.sign()

    def by_grad(self, x: Tensor, y: Tensor) -> Tensor:
        leaf = self._leaf(x)
        (g,) = torch.autograd.grad(F.cross_entropy(self(leaf), y), leaf)
        return g.sign()

    def projected(self, x: Tensor, y: Tensor) -> Tensor:
        """PGD: three steps."""
        moved = torch.zeros_like(x)
        for _ in range(3):
            moved = (moved + 0.5 * self.by_grad(x + moved, y)).clamp(-0.8, 0.8)
        return moved

    def only_inputs(self, x: Tensor, y: Tensor) -> Tensor:
        leaf = self._leaf(x)
        F.cross_entropy(self(leaf), y).backward(inputs=[leaf])
        assert leaf.grad is not None
        return leaf.grad.sign()

    def differentiable(self, x: Tensor, y: Tensor) -> Tensor:
        """create_graph, though nothing comes of it: what is added is detached."""
        leaf = self._leaf(x)
        (g,) = torch.autograd.grad(F.cross_entropy(self(leaf), y), leaf, create_graph=True)
        return g.detach()

    def by_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradients by the weights themselves, as GradNorm and MAML take them."""
        found = torch.autograd.grad(F.cross_entropy(self(x), y), list(self.parameters()))
        return torch.full_like(x, float(found[0].mean()))


KINDS = ["thrown_away", "zeroed", "by_grad", "projected", "only_inputs", "differentiable", "by_weights"]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_inner_passes_whose_gradients_do_not_stay_do_not_count(kind: str, first: int) -> None:
    def make() -> Net:
        net = Adversarial()
        net.kind, net.first = kind, first
        return net

    module, recorder, keep = recorded(make)
    check(module, keep)
    assert recorder.coverage.share == 1.0


class ByHand(Net):
    """Two passes of one batch, optimized by hand; ``between`` clears what the first left."""

    between = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        x, y = batch
        optimizer.zero_grad()
        self.manual_backward(self.loss(self.net, x, y) / 2)
        if self.between:
            optimizer.zero_grad()
        self.manual_backward(self.differentiate(x, y) / (1 if self.between else 2))
        optimizer.step()


@pytest.mark.parametrize("between", [False, True])
def test_manual_backward_passes_count_unless_cleared(between: bool) -> None:
    def make() -> Net:
        net = ByHand()
        net.between = between
        return net

    module, _, keep = recorded(make)
    check(module, keep)
