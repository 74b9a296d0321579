"""Discounted signals through the recorder, against dense matrix exponentials made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.curvature.spectral import exponential
from tests.helpers.factors import dense, draw
from tests.helpers.oracle import Batch, Keep, Transformer, cross_entropy, mlp


class TwoLayers(nn.Module):
    """Calls one layer twice and one once; leaves inputs and outputs in ``trace`` for the test's own factors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.trace: list[tuple[str, Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.trace = []
        for _ in range(2):
            y = self.layer(x)
            self.trace.append(("layer", x, y))
            x = torch.tanh(y)
        y = self.head(x)
        self.trace.append(("head", torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), y))
        return y


def recorded(
    model: nn.Module, batch: Batch, lr: float, total: int, queries: Any, **optimizer: Any
) -> tuple[Tensor, Recorder]:
    """One recorded step of SGD out of ``total``, discounted by K-FAC alone."""
    sgd, keep = torch.optim.SGD(model.parameters(), lr=lr, **optimizer), Keep()
    recorder = Recorder(
        model, sgd, len(batch[0]), queries, cross_entropy, [keep], total_steps=total, reservoir=0, on_error="raise"
    )
    with recorder:
        with recorder.batch(torch.arange(len(batch[0])), batch):
            loss = cross_entropy(model, batch)
            recorder.see(loss)
            loss.backward()
        sgd.step()
    return keep.steps[0][1], recorder


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.2}])
def test_signals_of_a_reused_layer_equal_those_of_the_dense_discount(options: dict[str, float]) -> None:
    """U = exp(-(R F + decay)) v and self-influence g^T D g / b, all from explicit dense matrices."""
    model = TwoLayers().double()
    x, y = draw(6, 3), torch.randint(3, (6,))
    lr, total, b = 0.3, 5, 6
    loss = cross_entropy(model, (x, y))
    deltas = torch.autograd.grad(loss, [out for _, _, out in model.trace])
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {"layer": [], "head": []}
    for (name, a, _), delta in zip(model.trace, deltas, strict=True):
        factors[name].append((delta.T @ delta * b, a.detach().T @ a.detach() / b))
    gain = 1 / (1 - options.get("momentum", 0.0))
    ahead = lr * (total - 1) * gain
    maps = {}
    for name, uses in factors.items():
        f = torch.kron(sum(left for left, _ in uses), sum(right for _, right in uses) / len(uses))
        maps[name] = torch.linalg.matrix_exp(
            -ahead * (f + options.get("weight_decay", 0.0) * torch.eye(len(f)).double())
        )

    def per_layer(value: Tensor) -> dict[str, Tensor]:
        layer, weight, bias = torch.autograd.grad(value, [model.layer.weight, model.head.weight, model.head.bias])
        return {"layer": layer.flatten(), "head": torch.cat([weight, bias[:, None]], 1).flatten()}

    rows = [per_layer(cross_entropy(model, (x[k : k + 1], y[k : k + 1]))) for k in range(b)]
    query = x[:3] + 1, y[:3]
    v = per_layer(cross_entropy(model, query))
    expected = torch.stack([torch.stack([sum(u[n] @ maps[n] @ g[n] for n in maps) / b for u in (v, g)]) for g in rows])
    found, _ = recorded(model, (x, y), lr, total, {"val": query, "self": "self"}, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def test_the_discount_follows_the_learning_rate_that_remains() -> None:
    """Directions made before step k are discounted by the steps k + 1 to 4."""

    def squares(module: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(module(batch[0]), batch[1])

    model, x, y = nn.Linear(4, 1), torch.randn(8, 4), torch.randn(8, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    recorder = Recorder(model, sgd, 8, {"val": (x, y)}, squares, total_steps=5, refresh_every=1, on_error="raise")
    with recorder:
        for step in range(5):
            assert recorder.schedule.remaining(0.5) == pytest.approx(0.5 * (5 - 1 - step))
            with recorder.batch(torch.arange(8), (x, y)):
                squares(model, (x, y)).backward()
            sgd.step()
            sgd.zero_grad()


def test_signals_of_tied_weights_are_discounted_by_the_diagonal() -> None:
    """The tied block's self-influence alone: all other parameters are frozen."""
    model = Transformer(tied=True).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "embed.weight")
    ids = torch.randint(3, (6, 5))
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        m.register_forward_hook(lambda m, a, out, n=n: kept.__setitem__(n, (a[0], out)))
        for n, m in [("embed", model.embed), ("head", model.head)]
    ]
    loss = cross_entropy(model, (ids, ids))
    for handle in handles:
        handle.remove()
    deltas = dict(zip(kept, torch.autograd.grad(loss, [out for _, out in kept.values()]), strict=True))
    terms = 30
    counts = ids.flatten().bincount(minlength=3).double() / 30
    diagonal = torch.outer(counts, deltas["embed"].square().sum((0, 1)) * terms)
    diagonal += torch.outer(deltas["head"].square().sum((0, 1)) * terms, kept["head"][0].detach().square().mean((0, 1)))
    d = torch.exp(-0.3 * 4 * diagonal)
    expected = []
    for k in range(6):
        (g,) = torch.autograd.grad(cross_entropy(model, (ids[k : k + 1], ids[k : k + 1])), [model.embed.weight])
        expected.append((g.square() * d).sum() / 6)
    found, _ = recorded(model, (ids, ids), 0.3, 5, "self")
    torch.testing.assert_close(found[:, 0], torch.stack(expected), rtol=1e-6, atol=1e-10)


def test_the_last_step_is_not_discounted() -> None:
    """Nothing of training remains: signals equal the first-order ones."""
    model, batch = mlp().double(), (draw(5, 4), torch.randint(3, (5,)))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    last, _ = recorded(model, batch, 0.3, 1, {"val": batch, "self": "self"})
    model.load_state_dict(state)
    model.zero_grad()
    keep, sgd = Keep(), torch.optim.SGD(model.parameters(), lr=0.3)
    first_order = Recorder(
        model, sgd, 5, {"val": batch, "self": "self"}, cross_entropy, [keep], discount=False, on_error="raise"
    )
    with first_order:
        with first_order.batch(torch.arange(5), batch):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        sgd.step()
    torch.testing.assert_close(last, keep.steps[0][1], rtol=1e-9, atol=1e-12)


def test_adam_discounts_by_one_scalar_a_layer() -> None:
    """The exponent of a layer is R times its Fisher over rms(sqrt(v)), here v = the present squared gradient.

    The same scalar weighs the layer's signals: a step moves it by so much.
    """
    model, b, lr, total = nn.Linear(3, 3, bias=False).double(), 6, 0.01, 4
    x, y = draw(b, 3), torch.randint(3, (b,))
    out = model(x)
    (delta,) = torch.autograd.grad(F.cross_entropy(out, y), [out])
    fisher = torch.kron(delta.T @ delta * b, x.T @ x / b)
    share = torch.einsum("bo,bi->boi", delta, x).flatten(1)
    rms = share.sum(0).square().mean().sqrt()
    d = torch.linalg.matrix_exp(-lr * (total - 1) * fisher / (rms + 1e-8))
    keep, adam = Keep(), torch.optim.Adam(model.parameters(), lr=lr)
    recorder = Recorder(model, adam, b, "self", cross_entropy, [keep], total_steps=total, on_error="raise")
    with recorder:
        with recorder.batch(torch.arange(b), (x, y)):
            cross_entropy(model, (x, y)).backward()
        adam.step()
    torch.testing.assert_close(keep.steps[0][1][:, 0], (share @ d * share).sum(1) * b / (rms + 1e-8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_curvature_is_updated_every_k_th_step(every: int) -> None:
    """The factors are the mean over steps 0, k, 2k, ..., made here from each step's inputs and output gradients."""
    model, b = nn.Linear(3, 3, bias=False).double(), 4
    keep, sgd = Keep(), torch.optim.SGD(model.parameters(), lr=0.5)
    recorder = Recorder(
        model, sgd, b, "self", cross_entropy, [keep], total_steps=9, curvature_every=every, on_error="raise"
    )
    lefts, rights = [], []
    with recorder:
        for step in range(5):
            x, y = draw(b, 3), torch.randint(3, (b,))
            if step % every == 0:
                out = model(x)
                (delta,) = torch.autograd.grad(F.cross_entropy(out, y), [out])
                lefts.append(delta.T @ delta * b)
                rights.append(x.T @ x / b)
            with recorder.batch(torch.arange(b), (x, y)):
                cross_entropy(model, (x, y)).backward()
            sgd.step()
            sgd.zero_grad()
    (own,) = recorder.signals.table
    assert recorder.signals.curvature is not None
    fisher = torch.kron(sum(lefts) / len(lefts), sum(rights) / len(rights))
    found = dense(recorder.signals.curvature.operator(own, exponential(1.0)), own.layout)
    torch.testing.assert_close(found, torch.linalg.matrix_exp(-fisher), rtol=1e-6, atol=1e-9)
