"""A small Lightning training that ends with chains."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from ine_callback import InfluenceCallback

ROWS, SHORT_CHAINS = 96, {"draws": 24, "chains": 4, "batch_size": 32}


class Model(L.LightningModule):
    def __init__(self, train_extra: float = 0.0, val_extra: float = 0.0) -> None:
        super().__init__()
        self.train_extra, self.val_extra = train_extra, val_extra
        self.net = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log("accuracy", self.accuracy(logits, batch[1]), on_epoch=True)
        self.seen.append(float(loss.detach())) if self.training else None
        return loss + self.train_extra * logits.square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        self.accuracy.update(logits, batch[1])
        loss = F.cross_entropy(logits, batch[1]) + self.val_extra * logits.square().mean()
        self.log("val", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(methods: Any, model: Model | None = None, queries: Any = "val", **kwargs: Any) -> tuple[Model, Any, L.Trainer]:
    torch.manual_seed(0)
    x = torch.randn(ROWS + 24, 5)
    y = x[:, :3].argmax(1)
    torch.manual_seed(1)
    model = Model() if model is None else model
    influence = InfluenceCallback(queries, methods, dirpath=kwargs.pop("dirpath", None), on_error="raise")
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=3, callbacks=[influence, *kwargs.pop("callbacks", [])], **options, **kwargs)
    train = DataLoader(TensorDataset(x[:ROWS], y[:ROWS]), batch_size=16, shuffle=True)
    trainer.fit(model, train, DataLoader(TensorDataset(x[ROWS:], y[ROWS:]), batch_size=24))
    return model, influence.report, trainer


QUIET = {"enable_progress_bar": False}


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(ROWS + 24, 5)
    return x, x[:, :3].argmax(1)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    x, y = data()
    train, val = TensorDataset(x[:ROWS], y[:ROWS]), TensorDataset(x[ROWS:], y[ROWS:])
    return DataLoader(train, batch_size=16, shuffle=True), DataLoader(val, batch_size=24)
