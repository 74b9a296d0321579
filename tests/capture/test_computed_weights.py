"""Modules that compute, count or draw when they are read: a recorded training is bit for bit the plain one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, Recorder
from ine_callback.capture import BlockTable, Capture
from ine_callback.capture.attributes import buffer, own_parameters, setting
from ine_callback.capture.errors import LayerError
from ine_callback.errors import InfluenceError
from tests.helpers.cases import mostly_long

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class LowRank(nn.Module):
    """A LoRA as a parametrization, with dropout and a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 6) / 3), nn.Parameter(torch.randn(8, 2) / 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight + self.calls / 100 * self.up @ F.dropout(self.down, 0.2)


class Drawn(nn.Linear):
    """The weight is a property that counts and draws noise (a Bayesian layer)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        del self.weight
        self.mean = nn.Parameter(torch.randn(outputs, inputs) / 3)
        self.reads = 0

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if "mean" not in self._parameters:
            raise AttributeError("weight")
        self.reads += 1
        return self.mean * (1 + self.reads / 1000) + 0.1 * torch.randn_like(self.mean)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.register_parameter("drawn", value)

    @weight.deleter
    def weight(self) -> None:
        del self._parameters["drawn"]


class Counts(nn.Linear):
    """Every attribute that is asked for in vain, and every ``eps`` or ``weight``, makes the next output smaller."""

    def __getattr__(self, name: str) -> Any:
        self.__dict__["asked"] = self.__dict__.get("asked", 0) + 1
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (1 + 0.01 * self.__dict__.get("asked", 0))


class PlainNorm(nn.LayerNorm):
    """``eps`` is a property that moves a generator."""

    @property
    def eps(self) -> float:  # type: ignore[override]
        return 1e-5 * float(1 + torch.rand(()))

    @eps.setter
    def eps(self, value: float) -> None:
        pass


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = PlainNorm(6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


def lora() -> nn.Module:
    layer = nn.Linear(6, 8)
    parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


def lazy() -> nn.Module:
    return nn.LazyLinear(8)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "parametrizations.spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 8)),
    "parametrizations.weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 8)),
    "parametrizations.orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 8)),
    "low rank, with dropout": lora,
    "spectral_norm of old": lambda: nn.utils.spectral_norm(nn.Linear(6, 8)),
    "weight_norm of old": lambda: nn.utils.weight_norm(nn.Linear(6, 8)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(6, 8), "weight", amount=0.3),
    "a property that draws": lambda: Drawn(6, 8),
    "__getattr__ that counts": lambda: Counts(6, 8),
    "eps that draws": Wide,
    "lazy": lazy,
}


class Net(lightning.LightningModule):
    def __init__(self, layer: Callable[[], nn.Module], cached: bool = False) -> None:
        super().__init__()
        self.net, self.cached = nn.Sequential(layer(), nn.ReLU(), nn.Linear(8, 3)), cached

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if not self.cached:
            return F.cross_entropy(self.net(x), y)
        with parametrize.cached():
            return F.cross_entropy(self.net(x), y) + F.cross_entropy(self.net(x + 1), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(
    make: Callable[[], lightning.LightningModule], callbacks: list[Any], sanity: int = 2
) -> tuple[dict[str, Tensor], Tensor]:
    """State and random state after a short fit."""
    torch.manual_seed(0)
    x, y = torch.randn(48, 6), torch.randint(3, (48,))
    module, data = make(), DataLoader(TensorDataset(x, y), batch_size=12)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=callbacks, num_sanity_val_steps=sanity, **quiet
    )
    trainer.fit(module, data, data)
    counts = {f"asked.{name}": torch.tensor(m.__dict__.get("asked", 0)) for name, m in module.named_modules()}
    return module.state_dict() | counts, torch.get_rng_state()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", mostly_long(LAYERS, "parametrizations.spectral_norm", "a property that draws", "__getattr__ that counts")
)
def test_training_is_bit_identical_with_and_without_the_callback(name: str) -> None:
    plain, state = fit(lambda: Net(LAYERS[name]), [])
    for options in ({}, {"uncaptured": "fallback"}):
        influence = InfluenceCallback(queries=["self", "val"], refresh_every=2, curvature_every=1, **options)
        found, after = fit(lambda: Net(LAYERS[name]), [influence])
        assert plain.keys() == found.keys() and torch.equal(state, after)
        assert [key for key in plain if not torch.equal(plain[key], found[key])] == []
        assert influence.report.run.steps == 12
        assert not any("recording stopped" in note for note in influence.report.run.notes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["parametrizations.spectral_norm", "low rank, with dropout"])
def test_cached_parametrizations_leave_training_bit_identical(name: str) -> None:
    plain, _ = fit(lambda: Net(LAYERS[name], cached=True), [])
    found, _ = fit(lambda: Net(LAYERS[name], cached=True), [InfluenceCallback(queries=["self", "val"])])
    assert [key for key in plain if not torch.equal(plain[key], found[key])] == []


def train(capture: bool) -> list[Tensor]:
    """A bare loop that holds the cache open around all that the recorder does."""
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(24, 6), torch.randint(3, (24,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    recorder = Recorder(model, optimizer, 24, {"val": (x, y)}, loss, on_error="raise", refresh_every=1)
    if capture:
        recorder.start()
    for rows in torch.arange(24).repeat(3).split(8):
        with parametrize.cached():
            if capture:
                recorder.start_batch(rows, (x[rows], y[rows]))
            loss(model, (x[rows], y[rows])).backward()
            if capture:
                recorder.end_batch()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in (*model.parameters(), *model.buffers())]


def test_an_open_parametrization_cache_gets_none_of_the_recorders_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorded = train(True)
    assert all(torch.equal(a, b) for a, b in zip(train(False), recorded, strict=True))


def test_lazy_weights_are_refused_with_a_remedy() -> None:
    """Lightning's sanity check runs the module before; without it a pass of ours would draw the weights."""
    with pytest.raises(InfluenceError, match=r"a lazy module has no weights yet.*run one batch through the model"):
        fit(lambda: Net(lazy), [InfluenceCallback(queries="val")], sanity=0)


def test_reading_attributes_runs_none_of_the_modules_code() -> None:
    layer = Counts(2, 2)
    before = layer.__dict__.get("asked", 0)
    Capture(nn.Sequential(layer), lambda *_: None, pytest.fail).attach()
    BlockTable(nn.Sequential(layer))
    assert list(own_parameters(layer)) == ["weight", "bias"] and buffer(layer, "running_mean") is None
    assert setting(layer, "in_features") == 2 and setting(layer, "eps", None) is None
    with pytest.raises(LayerError, match="'eps' is computed"):
        setting(PlainNorm(2), "eps")
    assert layer.__dict__.get("asked", 0) == before
