"""A small model under many Trainer options: training bit-identical, every visit counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, Query
from ine_callback.errors import InfluenceError, QueryError

ROWS, BATCH = 48, 8
X = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (ROWS,), generator=torch.Generator().manual_seed(1))


class Model(L.LightningModule):
    def __init__(self, optimizer: Callable[..., Any] = torch.optim.Adam, reentrant: bool | None = None) -> None:
        super().__init__()
        self.optimizer, self.reentrant = optimizer, reentrant
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.1))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.net(x))
        x = x.requires_grad_() if self.reentrant else x
        return self.head(checkpoint(self.net, x, use_reentrant=self.reentrant))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train", loss, on_epoch=True)
        return {"loss": loss}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.01)


class Plateau(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, nesterov=True)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val"}}


class ByHand(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()

    def optimizer(self, *args: Any, **options: Any) -> Any:
        return torch.optim.SGD(*args, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "optimizer":
            super().__setattr__(name, value)


class Skips(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class Augments(Model):
    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        if self.trainer.training:
            batch = [batch[0] + torch.randn_like(batch[0]), batch[1]]
        return batch


def fit(
    make: Callable[[], Model], options: dict[str, Any], callbacks: list[L.Callback]
) -> tuple[list[Tensor], L.Trainer]:
    L.seed_everything(3, verbose=False)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    extra = options.get("callbacks", list)()
    trainer = L.Trainer(
        **{"max_epochs": 3, "accelerator": "cpu", "logger": False, **quiet, **options, "callbacks": callbacks + extra}
    )
    model = make()
    loader = DataLoader(TensorDataset(X, Y), BATCH, shuffle=True)
    trainer.fit(model, loader, DataLoader(TensorDataset(X, Y), BATCH))
    left = [*model.state_dict().values(), *trainer.callback_metrics.values(), torch.get_rng_state()]
    return [value.clone() for value in left], trainer


CASES: dict[str, tuple[Callable[[], Model], dict[str, Any], int]] = {
    "plain": (Model, {}, 3 * ROWS),
    "checkpointing": (lambda: Model(reentrant=False), {}, 3 * ROWS),
    "checkpointing-reentrant": (lambda: Model(reentrant=True), {}, 3 * ROWS),
    "plateau-early-stopping": (Plateau, {"callbacks": lambda: [EarlyStopping("val", patience=5)]}, 3 * ROWS),
    "by-hand": (ByHand, {}, 3 * ROWS),
    "skipped-steps": (Skips, {}, 3 * (ROWS - 2 * BATCH)),
    "augmentation": (Augments, {}, 3 * ROWS),
    "accumulation": (Model, {"accumulate_grad_batches": 4}, 3 * ROWS),
    "clipping-by-norm": (Model, {"gradient_clip_val": 0.1}, 3 * ROWS),
    "clipping-by-value": (Model, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 3 * ROWS),
    "bf16-mixed": (Model, {"precision": "bf16-mixed"}, 3 * ROWS),
    "bf16-true": (Model, {"precision": "bf16-true"}, 3 * ROWS),
    "64-true": (Model, {"precision": "64-true"}, 3 * ROWS),
    "validation-inside": (Model, {"val_check_interval": 0.5}, 3 * ROWS),
    "fast-dev-run": (Model, {"fast_dev_run": True}, BATCH),
    "endless": (Model, {"max_epochs": -1, "max_steps": 8}, 8 * BATCH),
    "few-batches": (Model, {"limit_train_batches": 2}, 3 * 2 * BATCH),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "options", "visits"), CASES.values(), ids=CASES)
def test_training_is_untouched_and_every_visit_counted(
    make: Callable[[], Model], options: dict[str, Any], visits: int
) -> None:
    influence = InfluenceCallback(queries=["val", Query.margin("val"), "self"], refresh_every=3, on_error="raise")
    plain, _ = fit(make, options, [])
    recorded, _ = fit(make, options, [influence])
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    report = influence.report
    assert report is not None
    assert report.run.captured_share == 1.0
    assert int(report.observations.sum()) == visits


def test_queries_are_not_augmented() -> None:
    """Module hooks see the validation stage while a query is computed, and the training stage right after it."""
    stages = []

    class Watches(Model):
        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            stages.append("training" if self.trainer.training else "other")
            return batch

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            assert not self.trainer.training
            return super().validation_step(batch, batch_idx)

    fit(Watches, {"limit_val_batches": 1}, [InfluenceCallback(refresh_every=1, on_error="raise")])
    assert stages.count("training") == 3 * ROWS // BATCH  # what passes of ours append elsewhere is taken back


def test_lbfgs_is_refused() -> None:
    with pytest.raises(InfluenceError, match=r"InfluenceCallback: LBFGS .*use SGD, Adam or AdamW"):
        fit(lambda: Model(torch.optim.LBFGS), {}, [InfluenceCallback()])


def test_a_query_that_cannot_be_computed_is_named_before_training() -> None:
    with pytest.raises(QueryError, match=r"Query 'odd' cannot be computed .*its data must suit"):
        fit(Model, {}, [InfluenceCallback(queries={"odd": (torch.randn(4, 5), torch.zeros(4).long())})])


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(InfluenceError, match="one Trainer holds two of them; give one all the queries"):
        fit(Model, {}, [InfluenceCallback(), InfluenceCallback(queries="self")])


def test_one_enabled_callback_among_disabled_ones_is_fine() -> None:
    influence = InfluenceCallback(queries="self", on_error="raise")
    fit(Model, {}, [InfluenceCallback(enabled=False), influence])
    assert influence.report is not None
    assert influence.report.run.steps == 3 * ROWS // BATCH


def test_a_patch_of_somebody_else_comes_back() -> None:
    calls = []

    class Patches(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            convert = trainer.precision_plugin.convert_input
            trainer.precision_plugin.convert_input = lambda batch: (calls.append(1), convert(batch))[1]

    _, trainer = fit(Model, {}, [Patches(), InfluenceCallback(on_error="raise")])
    assert len(calls) >= 3 * ROWS // BATCH
    assert "<lambda>" in repr(trainer.precision_plugin.__dict__["convert_input"])


class Fickle(nn.Linear):
    """Returns a pair from its third call in training on."""

    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += self.training
        return (super().forward(x), None) if self.calls > 2 and self.training else super().forward(x)


def test_a_layer_lost_after_the_first_step_is_named() -> None:
    class Changes(Model):
        def __init__(self) -> None:
            super().__init__()
            self.extra = Fickle(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.extra(super().forward(x))
            return out[0] if isinstance(out, tuple) else out

    influence = InfluenceCallback(queries="self", on_error="raise")
    fit(Changes, {}, [influence])
    assert influence.report is not None
    (note,) = [note for note in influence.report.run.notes if "not captured from step 2 on" in note]
    assert "extra.weight (3.8%): its input or output is not a single tensor" in note
