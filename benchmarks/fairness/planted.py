"""Digits with a planted group: brightness that correlates .7 with "the digit is 5 or more"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.data import digits
from benchmarks.metrics import auroc
from ine_callback import FairSubspaces, InfluenceCallback, Subspaces
from ine_callback.methods.fairness import measures

TRAIN, EPOCHS, AGREE = 1200, 10, 0.85  # AGREE .85 makes a correlation of .7
QUIET: Any = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@dataclass(frozen=True)
class Rows:
    """Images x [n, 64], target y [n], group z [n]."""

    x: Tensor
    y: Tensor
    z: Tensor


def lit(x: Tensor, z: Tensor, g: torch.Generator) -> Tensor:
    """Images in the brightness of their group: a factor of .8 or 1, with standard deviation .05."""
    return x * (0.8 + 0.2 * z + 0.05 * torch.randn(len(x), generator=g))[:, None]


def problem(target: str, seed: int) -> tuple[Rows, Rows, Rows]:
    """Training rows, held-out rows of the same kind, and the latter with groups that know nothing of the digit."""
    images, classes = digits(None)
    g = torch.Generator().manual_seed(seed)
    images, classes = (part[torch.randperm(len(classes), generator=g.manual_seed(seed))] for part in (images, classes))
    high = (classes >= 5).long()
    z = torch.where(torch.rand(len(high), generator=g) < AGREE, high, 1 - high)
    y = high if target == "high" else classes
    x = lit(images, z, g)
    other = torch.randint(2, (len(high) - TRAIN,), generator=g)
    return (
        Rows(x[:TRAIN], y[:TRAIN], z[:TRAIN]),
        Rows(x[TRAIN:], y[TRAIN:], z[TRAIN:]),
        Rows(lit(images[TRAIN:], other, g), y[TRAIN:], other),
    )


class Net(L.LightningModule):
    """An MLP 64-32-C."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, classes)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.hidden(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def judged(outputs: Tensor, rows: Rows) -> dict[str, float]:
    """Accuracy, and the gaps of the decisions between the groups."""
    classes, weights = outputs.shape[1], torch.full((len(rows.y),), 1 / len(rows.y))
    decided = torch.eye(classes)[outputs.argmax(1)]
    groups, target = torch.eye(2)[rows.z], torch.eye(classes)[rows.y]
    gap = float(measures.gap(decided, groups, weights))
    most = 1 - float(groups.mean(0).min()) * max(float(measures.gap(target, groups, weights)) - gap, 0.0)
    return {
        "accuracy": float((outputs.argmax(1) == rows.y).float().mean()),
        "most": most,
        "gap": gap,
        "odds": float(measures.equalised_odds(decided, groups, target, weights)),
    }


def probe(train: Tensor, z: Tensor, held_out: Tensor, truth: Tensor, hidden: bool) -> float:
    """AUC on held-out rows of a linear or an MLP probe that reads the group."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    model = (
        MLPClassifier((64,), max_iter=400, random_state=0, alpha=1e-2) if hidden else LogisticRegression(max_iter=2000)
    )
    mean, scale = train.mean(0), (train - train.mean(0)).std()  # one scale: a column's own would blow up rounding
    fitted = model.fit(((train - mean) / scale).numpy(), z.numpy())
    return auroc(fitted.predict_proba(((held_out - mean) / scale).numpy())[:, 1], truth.numpy() == 1)


def measured(target: str, features: str, seed: int) -> dict[str, Any]:
    """A network, its path on rows that it was not trained on, and what probes read."""
    train, same, shuffled = problem(target, seed)
    influence = InfluenceCallback("self", [FairSubspaces(sensitive=2, features=features, seed=seed)], on_error="raise")
    L.seed_everything(seed, verbose=False)
    net = Net(int(train.y.max()) + 1)
    loader = DataLoader(TensorDataset(train.x, train.y, train.z), 32, shuffle=True)
    L.Trainer(max_epochs=EPOCHS, callbacks=[influence], enable_model_summary=False, **QUIET).fit(net, loader)
    assert influence.report is not None
    found: Subspaces = influence.report.subspaces

    def read(rows: Rows) -> Tensor:
        return net.hidden(rows.x).detach() if features == "penultimate" else rows.x

    with torch.no_grad():
        both = {"same": same, "shuffled": shuffled}
        network = {name: judged(net.head(net.hidden(rows.x)), rows) for name, rows in both.items()}
        path = {
            f"{point.keep:g}": {name: judged(found.head(point.keep)(read(rows)), rows) for name, rows in both.items()}
            for point in found.path
        }
        last = found.path[-1].keep
        probes = {
            f"{keep:g}": {
                name: probe(project(read(train)), train.z, project(read(same)), same.z, name == "MLP")
                for name in ("linear", "MLP")
            }
            for keep in (0.0, last)
            for project in [found.projection(keep)]
        }
    directions = [[each.kind, each.cosine, each.low, each.high] for each in found.directions]
    own = {} if features != "penultimate" else {
        name: judged(net.head(found.projection(0)(read(rows))).detach(), rows) for name, rows in both.items()
    }  # fmt: skip
    return {
        "network": network, "path": path, "probes": probes, "directions": directions, "own head": own,
        "check": found.attribution.checks[0].value,
    }  # fmt: skip
