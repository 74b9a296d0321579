"""A training whose gradients are changed before the step, and the signals of a loop over rows changed the same way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, Recorder
from tests.helpers.oracle import Keep

ROWS, SIZE = 24, 6
QUIET: dict[str, Any] = {
    **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    **{"enable_model_summary": False, "enable_checkpointing": False},
}
Gradients = list[Tensor]
Changed = Callable[[Gradients], Gradients]
X, Y = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1)).double(), torch.arange(ROWS) % 3


class Net(L.LightningModule):
    """Two layers, weight and bias each, in the order of ``parameters()``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.double()

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)

    def change(self, changed: Changed) -> None:
        """In place, as clipping does it."""
        for p, g in zip(self.parameters(), changed([p.grad for p in self.parameters()]), strict=True):
            p.grad.copy_(g)


def by_norm(grads: Gradients, most: float = 0.05) -> Gradients:
    factor = most / float(torch.stack([g.norm() for g in grads]).norm())
    return [g * min(1.0, factor) for g in grads]


def loader(size: int = SIZE) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=size)


def fit(kind: type[Net], influence: InfluenceCallback | None, batches: Any = None, **options: Any) -> Net:
    L.seed_everything(3, verbose=False)
    module, own = kind(), [] if influence is None else [influence]
    callbacks = [*options.pop("callbacks", []), *own]
    trainer = L.Trainer(**{**QUIET, **options}, callbacks=callbacks)
    trainer.fit(module, loader() if batches is None else batches, loader(ROWS))
    return module


def keeping(queries: Any = ("val", "self")) -> tuple[InfluenceCallback, Keep]:
    keep = Keep()
    options = {"discount": False, "refresh_every": 1, "rank": None, "initial_weights": "fixed"}
    return InfluenceCallback(list(queries), methods=[keep], **options), keep


def recorded(kind: type[Net], batches: Any = None, **options: Any) -> tuple[Keep, InfluenceCallback]:
    """Trains with and without us; the weights must be the same to the last bit."""
    influence, keep = keeping()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*report was lost: NotImplementedError")
        found = fit(kind, influence, batches, **options)
    plain = fit(kind, None, batches, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), found.parameters(), strict=True))
    return keep, influence


def grads_of(module: Net, batch: Any) -> Gradients:
    return [g.detach() for g in torch.autograd.grad(module.loss(batch), list(module.parameters()))]


def signals_of(v: Gradients, factors: Gradients, shares: list[Gradients], rows: int) -> Tensor:
    """Signals [b, 2] of shares whose gradients were changed by these factors."""
    val = [sum(float((a * f * g).sum()) for a, f, g in zip(v, factors, share, strict=True)) for share in shares]
    own = [rows * sum(float((f * g * g).sum()) for f, g in zip(factors, share, strict=True)) for share in shares]
    return torch.tensor([val, own]).double().T


def by_rows(kind: type[Net], changed: Changed, accumulate: int = 1, size: int = SIZE) -> list[Tensor]:
    """The loop over rows: plain SGD on the changed gradients; each step's signals."""
    L.seed_everything(3, verbose=False)
    module, expected = Net() if kind is not Net else kind(), []
    batches = [torch.arange(ROWS)[k : k + size] for k in range(0, ROWS, size)]
    for first in range(0, len(batches), accumulate):
        rows = torch.cat(batches[first : first + accumulate])
        v = grads_of(module, (X, Y))
        count = size * len(batches[first : first + accumulate])
        shares = [[g / count for g in grads_of(module, (X[k : k + 1], Y[k : k + 1]))] for k in rows.tolist()]
        grads = [torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)]
        after = changed([g.clone() for g in grads])
        factors = [(a * g).sum() / (g * g).sum() for a, g in zip(after, grads, strict=True)]
        expected.append(signals_of(v, factors, shares, count))
        with torch.no_grad():
            for p, g in zip(module.parameters(), after, strict=True):
                p.sub_(0.2 * g)
    return expected


def same(keep: Keep, expected: list[Tensor], **tolerance: float) -> None:
    assert len(keep.steps) == len(expected)
    for (_, signals, _), truth in zip(keep.steps, expected, strict=True):
        torch.testing.assert_close(signals, truth, **(tolerance or {"rtol": 1e-7, "atol": 1e-12}))


def bare(step: Callable[[Net, Any, Callable[[Any], Tensor]], None], make: Any = None) -> tuple[Keep, Recorder, Net]:
    """A loop of ``step(module, optimizer, pass)`` calls, ``pass`` being a forward and backward pass of the batch."""
    L.seed_everything(3, verbose=False)
    module, keep = Net(), Keep()
    optimizer = (make or (lambda p: torch.optim.SGD(p, lr=0.2)))(module.parameters())
    options: dict[str, Any] = {"discount": False, "refresh_every": 1, "rank": None, "initial_weights": "fixed"}
    recorder = Recorder(
        module,
        optimizer,
        ROWS,
        {"val": (X, Y), "self": "self"},
        lambda m, b: m.loss(b),
        [keep],
        on_error="raise",
        **options,
    )
    with recorder:
        for rows in torch.arange(ROWS).split(SIZE):
            batch = X[rows], Y[rows]

            def once(_: Any = None, batch: Any = batch) -> Tensor:
                loss = module.loss(batch)
                recorder.see(loss)
                loss.backward()
                return loss

            with recorder.batch(rows, batch):
                step(module, optimizer, once)
    return keep, recorder, module
