"""What a step changes beside its module, in closures, globals, callbacks or schedulers: training does not notice us."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ine_callback import InfluenceCallback
from ine_callback.utilities.isolation import isolated
from tests.helpers.identical import History, differing, fitted

SEEN: list[int] = []
COUNTS = {"steps": 0}
MOVED = torch.zeros(2)


QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
X, Y = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counted(Classifier):
    """Its loss is weighted by what it counted somewhere."""

    def count(self) -> float:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss * (1 + 0.01 * self.count())


class Globals(Counted):
    def __init__(self) -> None:
        super().__init__()
        SEEN.clear()
        COUNTS["steps"] = 0
        MOVED.zero_()
        globals().pop("STEPS", None)

    def count(self) -> float:
        global STEPS
        STEPS = globals().get("STEPS", 0) + 1
        SEEN.append(1)
        COUNTS["steps"] += 1
        MOVED.add_(1)
        return len(SEEN) + COUNTS["steps"] + float(MOVED[0]) + STEPS


class Closure(Counted):
    def __init__(self) -> None:
        super().__init__()
        rebound, held = 0, [0]

        def count(default: list[int] = [0]) -> int:  # noqa: B006
            nonlocal rebound
            rebound += 1
            held[0] += 1
            default[0] += 1
            return rebound + held[0] + default[0]

        count.__defaults__[0][0] = 0  # type: ignore[index]
        self.counted = count

    def count(self) -> float:
        return self.counted()


class Rows(Dataset[Any]):
    def __init__(self) -> None:
        self.reads = 0

    def __getitem__(self, row: int) -> int:
        self.reads += 1
        return self.reads


class Numbers(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []


class Curriculum(L.Callback):
    def __init__(self) -> None:
        self.level = 0


class Held(Counted):
    """A data set, a data module, a callback and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.numbers, self.curriculum = Rows(), Numbers(), Curriculum()
        self.bytes, self.array = bytearray(), array("l")

    def count(self) -> float:
        self.numbers.calls.append(1)
        self.curriculum.level += 1
        self.bytes += b"a"
        self.array.append(1)
        return len(self.numbers.calls) + self.curriculum.level + self.rows[0] + len(self.bytes) + len(self.array)


class OfTheTrainer(Counted):
    def count(self) -> float:
        curriculum = next(each for each in self.trainer.callbacks if isinstance(each, Curriculum))  # type: ignore[attr-defined]
        curriculum.level += 1
        self.trainer.mine = getattr(self.trainer, "mine", 0) + 1
        group = self.trainer.optimizers[0].param_groups[0]
        group["calls"] = group.get("calls", 0) + 1
        return curriculum.level + self.trainer.mine + group["calls"]


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.schedule.step()
        return super().training_step(batch, batch_idx)


class Scripted(Classifier):
    """Parts of its network keep their tensors where no attribute is."""

    def __init__(self) -> None:
        inner = torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()))
        super().__init__(nn.Sequential(inner, nn.Linear(6, 3)))


def trained(make: Callable[[], Classifier], *callbacks: L.Callback, **options: Any) -> dict[str, list[Any]]:
    L.seed_everything(5, verbose=False)
    history, rows = History(), TensorDataset(X, Y)
    quiet = {"max_epochs": 3, "enable_progress_bar": False, **QUIET, **options}
    trainer = L.Trainer(**quiet, callbacks=[*callbacks, history])
    trainer.fit(make(), DataLoader(rows, 6, shuffle=True), DataLoader(rows, 20))
    return fitted(trainer, history)


KINDS = [Globals, Closure, Held, OfTheTrainer, Scheduled, Scripted]


@pytest.mark.parametrize("make", KINDS, ids=lambda kind: kind.__name__)
def test_training_does_not_notice(make: Callable[[], Classifier]) -> None:
    plain = trained(make, Curriculum())
    influence = InfluenceCallback(["val", "self"])
    assert differing(plain, trained(make, influence, Curriculum())) == []
    assert influence.report is not None and influence.report.observations.sum() == 60


class Written(DummyLogger):
    """A user's own logger, that a step writes to by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.lines.append((args, str(kwargs)))


class WritesByHand(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.logger.log_metrics({"by hand": 1.0})  # type: ignore[union-attr]
        self.logger.experiment.add_scalar("a", 1.0)  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)


def test_a_logger_gets_nothing_from_passes_of_ours() -> None:
    plain, logger = Written(), Written()
    trained(WritesByHand, logger=plain)
    trained(WritesByHand, InfluenceCallback(["val", "self"], log_scores=False, dirpath=None), logger=logger)
    assert logger.lines == plain.lines and len(plain.lines) == 12


LARGE = torch.zeros(20_000)


class ReadsALargeTensor(nn.Module):
    def forward(self) -> Tensor:
        return LARGE[:2]


def test_large_tensors_that_code_reads_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    clone = Tensor.clone

    def counted(self: Tensor, **options: Any) -> Tensor:
        copied.append(self.numel())
        return clone(self, **options)

    monkeypatch.setattr(Tensor, "clone", counted)
    with isolated(ReadsALargeTensor()):
        pass
    assert max(copied, default=0) < LARGE.numel()
