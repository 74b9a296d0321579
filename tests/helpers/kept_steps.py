"""A training that keeps what each step was differentiated at, and its signals by a pass for each row."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback
from tests.helpers.oracle import Keep

ROWS, BATCH = 24, 6
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (ROWS,), generator=generator)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Net(L.LightningModule):
    """Cross entropy; ``seen`` keeps what each step was differentiated at: inputs, targets and weights."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = (net or mlp()).double()
        self.seen: list[tuple[Tensor, Tensor, nn.Module]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def differentiate(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training and not torch.is_inference_mode_enabled():
            self.seen.append((x.detach().clone(), y, copy.deepcopy(self.net)))
        return self.loss(self.net, x, y)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y)

    def query(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(net, x, y)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.differentiate(*batch)

    def validation_step(self, batch: Any, index: int) -> Tensor:
        return self.query(self.net, *batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: L.LightningModule, callbacks: list[L.Callback], **trainer: Any) -> None:
    x, y = data()
    torch.manual_seed(1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **trainer}
    train = DataLoader(TensorDataset(x, y), BATCH)
    L.Trainer(callbacks=callbacks, **options).fit(module, train, DataLoader(TensorDataset(x, y), ROWS))


def recorded(make: Callable[[], Net], trainer: dict[str, Any] | None = None, **options: Any) -> tuple[Net, Any, Keep]:
    """The module, its callback and its steps; the weights must be those of a plain run."""
    keep, plain, module = Keep(), make(), make()
    fit(plain, [], **trainer or {})
    settings = {"queries": "val", "methods": [keep], "discount": False, "refresh_every": 1, "rank": None}
    callback = InfluenceCallback(**{**settings, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, [callback], **trainer or {})
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)
    module.seen = [step for step in module.seen if len(step[0]) == BATCH or len(step[0]) == 2 * BATCH]
    return module, callback._recorder, keep


def truth(module: Net, step: int, names: set[str] | None = None, mean: bool = True) -> Tensor:
    """<v, each row's contribution> of one step, of the named parameters, by a pass a row."""
    x, y, net = module.seen[step]
    parameters = [p for n, p in net.named_parameters() if names is None or n in names]
    net.eval()
    v = torch.autograd.grad(module.query(net, *data()), parameters, allow_unused=True)
    out = []
    for row in range(len(x)):
        value = module.loss(net, x[row : row + 1], y[row : row + 1]) / (len(x) if mean else 1)
        g = torch.autograd.grad(value, parameters, allow_unused=True)
        out.append(sum((a * b).sum() for a, b in zip(v, g, strict=True) if a is not None and b is not None))
    return torch.stack([torch.as_tensor(one, dtype=torch.float64) for one in out]).detach()


def check(module: Net, keep: Keep, names: set[str] | None = None, steps: int = 4) -> None:
    assert len(keep.steps) == steps == len(module.seen)
    for step, (_, signals, _) in enumerate(keep.steps):
        torch.testing.assert_close(signals[:, 0], truth(module, step, names), **EXACT)
