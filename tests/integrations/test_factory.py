"""INE_CALLBACK=1, through the entry points that Lightning looks for."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback
from ine_callback.errors import InfluenceError
from ine_callback.integrations.environment import EnvironmentCallback


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", max_epochs=1, **quiet, **options)


def ours(made: L.Trainer) -> list[InfluenceCallback]:
    return [callback for callback in made.callbacks if isinstance(callback, InfluenceCallback)]


@pytest.mark.parametrize("group", ["lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"])
def test_both_names_of_lightning_find_it(group: str) -> None:
    (found,) = entry_points(group=group, name="ine_callback")
    assert found.load()() == []


@pytest.mark.parametrize("value", [None, "", "0", "False", "off"])
def test_off_by_default_and_when_asked(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INE_CALLBACK", raising=False)
    if value is not None:
        monkeypatch.setenv("INE_CALLBACK", value)
    assert not ours(trainer())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("validated", [True, False])
def test_on_it_records_what_there_is(validated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INE_CALLBACK", "1")
    made = trainer()
    (callback,) = ours(made)
    module = BoringModel() if validated else Plain()
    train = None if validated else DataLoader(TensorDataset(torch.randn(12, 4)), 4)
    made.fit(module, train)
    assert callback.report is not None
    assert callback.report.queries == (("val", "self") if validated else ("self",))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_steps_back_for_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INE_CALLBACK", "yes")
    own = InfluenceCallback("self")
    made = trainer(callbacks=[own])
    (other,) = (callback for callback in ours(made) if isinstance(callback, EnvironmentCallback))
    made.fit(Plain(), DataLoader(TensorDataset(torch.randn(12, 4)), 4))
    assert own.report is not None and other.report is None


def test_what_it_cannot_record_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Climbs(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    monkeypatch.setenv("INE_CALLBACK", "1")
    with pytest.raises(InfluenceError, match=r"INE_CALLBACK=1; 0 switches it off\): LBFGS"):
        trainer().fit(Climbs(), DataLoader(TensorDataset(torch.randn(12, 4)), 4))


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INE_CALLBACK", "maybe")
    with pytest.raises(InfluenceError, match="INE_CALLBACK='maybe' is neither on nor off; set it to 1 or 0"):
        trainer()
