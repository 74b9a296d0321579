"""One recorded training for each optimizer with a rule: no warning, finite scores, and the same training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import FINE, InfluenceCallback
from tests.helpers.identical import History, compare, fitted
from tests.helpers.optimizers import Lion

MADE: dict[str, Callable[[Any], Optimizer]] = {
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW, amsgrad, lr as a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.01),
    "Adagrad, fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
    "Lion": lambda p: Lion(p, lr=0.001, weight_decay=0.1),
}
if hasattr(torch.optim, "Adafactor"):
    MADE["Adafactor"] = lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1)
if hasattr(torch.optim, "Muon"):
    MADE["Muon"] = lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.02)


class Net(L.LightningModule):
    def __init__(self, make: Callable[[Any], Optimizer], bias: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))
        self._make = make

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        optimizer = self._make(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)}


def trained(make: Callable[[Any], Optimizer], bias: bool, *callbacks: L.Callback) -> dict[str, list[Any]]:
    L.seed_everything(0, verbose=False)
    x, history = torch.randn(60, 4), History()
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    trainer = L.Trainer(
        max_epochs=4,
        callbacks=[history, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows, held_out = TensorDataset(x[:48], y[:48]), TensorDataset(x[48:], y[48:])
    trainer.fit(Net(make, bias), DataLoader(rows, 8, shuffle=True), DataLoader(held_out, 12))
    return fitted(trainer, history)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MADE)
def test_a_recorded_training(name: str, tmp_path: Path) -> None:
    influence = InfluenceCallback(
        ["val", "self"], [FINE()], refresh_every=3, curvature_every=1, dirpath=tmp_path, on_error="raise"
    )
    bias = name != "Muon"  # that takes matrices alone
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorded = trained(MADE[name], bias, influence)
    assert not [
        str(w.message) for w in caught if "InfluenceCallback" in str(w.message) or "plain SGD" in str(w.message)
    ]
    assert influence.report is not None
    scores = influence.report.scores.mu
    assert scores.shape == (48, 2) and np.isfinite(scores).all() and (scores.std(0) > 0).all()
    assert not influence.report.run.nonfinite
    compare(recorded, trained(MADE[name], bias))


class Unknown(Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad)
        return loss


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_optimizer_is_named_in_a_warning_and_in_the_report(tmp_path: Path) -> None:
    influence = InfluenceCallback("val", [FINE()], dirpath=tmp_path)
    with pytest.warns(UserWarning, match=r"Unknown has no update rule.*plain SGD; @register_optimizer\(Unknown\)"):
        trained(Unknown, True, influence)
    assert influence.report is not None and any("no update rule" in note for note in influence.report.run.notes)
