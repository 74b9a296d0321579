"""Of several backward passes before a step, those count whose gradients it takes, as of closures that run twice."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.changed_gradients import (
    ROWS,
    SIZE,
    Gradients,
    Net,
    X,
    Y,
    bare,
    by_norm,
    by_rows,
    grads_of,
    recorded,
    same,
    signals_of,
)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: the step is taken with the gradient at perturbed weights."""

    def __init__(self, parameters: Any, lr: float = 0.2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        ps = [p for group in self.param_groups for p in group["params"]]
        old = [p.clone() for p in ps]
        norm = torch.stack([p.grad.norm() for p in ps]).norm()
        for p in ps:
            p.add_(p.grad, alpha=0.3 / float(norm))
        with torch.enable_grad():
            closure()
        for p, before in zip(ps, old, strict=True):
            p.copy_(before)
            p.sub_(0.2 * p.grad)
        return loss


class Sharp(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SAM(self.parameters())


class SharpInPlace(Sharp):
    """Gradients are zeroed, not removed."""

    def optimizer_zero_grad(self, epoch: int, index: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


def sharp_by_rows(summed: bool = False) -> list[Tensor]:
    """Signals of SAM's second pass at its weights; with ``summed`` those of both passes, never zeroed in between."""
    L.seed_everything(3, verbose=False)
    module, expected = Net(), []
    for rows in torch.arange(ROWS).split(SIZE):
        v = grads_of(module, (X, Y))

        def shares_at(module: Net, rows: Tensor = rows) -> list[Gradients]:
            return [[g / SIZE for g in grads_of(module, (X[k : k + 1], Y[k : k + 1]))] for k in rows.tolist()]

        first = shares_at(module)
        total = [torch.stack(parts).sum(0) for parts in zip(*first, strict=True)]
        there, norm = copy.deepcopy(module), torch.stack([g.norm() for g in total]).norm()
        with torch.no_grad():
            for p, g in zip(there.parameters(), total, strict=True):
                p.add_(g, alpha=0.3 / float(norm))
        second = shares_at(there)
        ones = [torch.ones(()) for _ in v]
        signals = signals_of(v, ones, second, SIZE)
        expected.append(signals + signals_of(v, ones, first, SIZE) if summed else signals)
        with torch.no_grad():
            for k, p in enumerate(module.parameters()):
                p.sub_(0.2 * sum(share[k] for share in second))
                if summed:
                    p.sub_(0.2 * total[k])
    return expected


@pytest.mark.filterwarnings("ignore:.*taken as plain SGD")
@pytest.mark.parametrize("kind", [Sharp, SharpInPlace])
def test_of_two_closure_calls_the_last_counts(kind: type[Net]) -> None:
    keep, influence = recorded(kind)
    same(keep, sharp_by_rows())
    losses = influence._recorder.accumulators._losses.mean()  # type: ignore[union-attr]
    assert np.isfinite(losses).all() and losses.max() < 4  # of one pass, not of two


class SharpByHand(Sharp):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


@pytest.mark.filterwarnings("ignore:.*taken as plain SGD")
def test_of_two_closure_calls_by_hand_the_last_counts() -> None:
    keep, _ = recorded(SharpByHand)
    same(keep, sharp_by_rows())


@pytest.mark.filterwarnings("ignore:.*taken as plain SGD")
@pytest.mark.parametrize("how", ["removed", "zeroed", "by the module", "one by one", "kept"])
def test_of_two_closure_calls_in_a_bare_loop(how: str) -> None:
    def step(module: Net, optimizer: Any, once: Any) -> None:
        if how == "kept":
            optimizer.zero_grad()

        def closure() -> Tensor:
            if how in ("removed", "zeroed"):
                optimizer.zero_grad(set_to_none=how == "removed")
            elif how == "by the module":
                module.zero_grad()
            elif how == "one by one":
                for p in module.parameters():
                    p.grad = None
            loss: Tensor = once()
            return loss

        optimizer.step(closure)

    keep, _, _ = bare(step, SAM)
    same(keep, sharp_by_rows(summed=how == "kept"))


def test_two_passes_without_a_step_between_them() -> None:
    """The first pass's gradients are thrown away; and SAM in two calls, on whose inner optimizer the step is."""

    def step(module: Net, optimizer: Any, once: Any) -> None:
        once()
        ps, old = list(module.parameters()), [p.detach().clone() for p in module.parameters()]
        norm = torch.stack([p.grad.norm() for p in ps]).norm()
        with torch.no_grad():
            for p in ps:
                p.add_(p.grad, alpha=0.3 / float(norm))
        optimizer.zero_grad()
        once()
        with torch.no_grad():
            for p, before in zip(ps, old, strict=True):
                p.copy_(before)
        optimizer.step()
        optimizer.zero_grad()

    keep, _, _ = bare(step)
    same(keep, sharp_by_rows())


class Gathered(Net):
    """Gradients gathered over two batches, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        if index % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch) / 2)
        if index % 2:
            self.change(by_norm)
            optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_gradients_gathered_by_hand() -> None:
    keep, _ = recorded(Gathered)
    same(keep, by_rows(Net, by_norm, accumulate=2))


def test_passes_that_no_step_takes_do_not_pile_up() -> None:
    def step(module: Net, optimizer: Any, once: Any) -> None:
        once()
        optimizer.zero_grad()  # as where a scaler skips the step

    _, recorder, _ = bare(step)
    assert len(recorder.lanes[0].pending._passes) <= 1
