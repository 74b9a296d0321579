"""Layers and optimizers that are replaced during the fit: not recorded, and named for what they are."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback
from ine_callback.errors import CaptureError
from ine_callback.report import InfluenceReport


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NewHead(Net):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[2] = nn.Linear(6, 3)
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[2].parameters())})


class NewOptimizer(Net):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers = [torch.optim.Adam(self.parameters())]


class Unregistered(Net):
    """A layer in a plain list, which the optimizer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.more = [nn.Linear(5, 5)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([self.more[0](batch[0]).tanh(), batch[1]], batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), *self.more[0].parameters()], lr=0.1)


def report_of(module: Net, **options: Any) -> InfluenceReport:
    L.seed_everything(0, verbose=False)
    influence = InfluenceCallback("self", on_error="raise", **options)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", enable_model_summary=False, callbacks=[influence], **quiet)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(20, 5), torch.arange(20) % 3), 5))
    assert influence.report is not None
    return influence.report


def test_a_layer_that_comes_later_is_named_as_that() -> None:
    told = report_of(NewHead()).run.uncaptured
    assert set(told) == {"net.2.weight", "net.2.bias"}
    assert all("not in the model when the recording began" in why and "from step 4 on" in why for why in told.values())


def test_another_optimizer_is_told() -> None:
    report = report_of(NewOptimizer())
    assert report.run.steps == 4
    assert any("another optimizer (Adam) during the fit: its steps are not recorded" in n for n in report.run.notes)


def test_what_the_optimizer_trains_beside_the_module_is_named_and_counted() -> None:
    with pytest.warns(UserWarning, match=r"trains 2 parameters that are not the module's \(\[5, 5\], \[5\]\)"):
        run = report_of(Unregistered()).run
    own = 6 * 5 + 6 + 3 * 6 + 3
    assert len(run.uncaptured) == 1 and run.captured_share == pytest.approx(own / (own + 30))
    with pytest.raises(CaptureError, match="ModuleList"):
        report_of(Unregistered(), uncaptured="raise")
