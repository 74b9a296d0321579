"""A training whose rows have a source, and effects of it: what reports with effects are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import FINE, CausalEffects, InfluenceCallback
from ine_callback.effects import ATE, NIE, EffectData, Outcome, estimate, paths
from ine_callback.report import InfluenceReport, example_report

SOURCED, GRAPH = 240, "size -> web; size -> loss; web -> loss"
TIERS = [["size"], ["web"], ["contrast", "noise"], ["loss"]]


def sourced() -> dict[str, Any]:
    """Columns of the rows: their size, and whether they come from the web."""
    rng = np.random.default_rng(0)
    size = rng.normal(size=SOURCED)
    return {"size": size, "web": rng.random(SOURCED) < 1 / (1 + np.exp(-0.5 * size))}


class Sorter(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sourced_rows() -> tuple[Tensor, Tensor]:
    """Inputs and labels; labels of the web are noisier."""
    made, columns = torch.Generator().manual_seed(0), sourced()
    x = torch.randn(SOURCED, 5, generator=made)
    x[:, 0], x[:, 1] = torch.tensor(columns["size"]), torch.tensor(columns["web"])
    return x, (x[:, 0] + torch.randn(SOURCED, generator=made) * (0.3 + 2 * x[:, 1]) > 0).long()


def sourced_fit(methods: Sequence[Any], dirpath: Any = None, raises: bool = True, **options: Any) -> tuple[Any, ...]:
    """Model, callback and trainer of a training on these rows."""
    torch.manual_seed(1)
    data, model = TensorDataset(*sourced_rows()), Sorter()
    influence = InfluenceCallback("val", methods, dirpath=dirpath, on_error="raise" if raises else "warn")
    quiet = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"max_epochs": 2, "enable_progress_bar": False, "callbacks": [influence], **quiet, **options}
    trainer = L.Trainer(**settings)
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True), DataLoader(data, batch_size=120))
    return model, influence, trainer


def source_effect(**changed: Any) -> CausalEffects:
    return CausalEffects(**({"treatment": "web", "columns": sourced(), "graph": GRAPH, "folds": 2} | changed))


def effect_methods(**changed: Any) -> list[Any]:
    return [FINE(), source_effect(**changed)]


def report_with_effects(seed: int = 0, tau: float = 0.15) -> InfluenceReport:
    """A report of 600 rows with an effect, one through a mediator, and paths; its last row was never observed."""
    rng, report = np.random.default_rng(1), example_report(600, seed=seed)
    size, noise = rng.normal(size=(2, 600))
    web = rng.random(600) < 1 / (1 + np.exp(-0.5 * size))
    contrast = 0.8 * web + 0.4 * size + rng.normal(size=600)
    loss = -0.6 * contrast + 0.3 * web + 0.5 * np.random.default_rng(seed).normal(size=600)
    kept = np.arange(599)
    columns = {"size": size, "web": web, "contrast": contrast, "noise": noise}
    columns = {name: column[kept] for name, column in columns.items()}
    outcome = Outcome("loss", loss[kept])
    graph = "size -> web -> contrast -> loss; size -> contrast; web -> loss"
    data = EffectData(columns, "web", outcome, graph)
    found = [estimate(data, each, "linear") for each in (ATE(), NIE())]
    return report.with_effects(*found, paths(EffectData(columns, "web", outcome, tiers=TIERS), tau), rows=kept)
