"""Under a Trainer on a GPU: bit-identical training, every visit counted, chains and resumed runs as on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import BIF, FINE, InfluenceCallback, InfluenceReport
from tests.helpers.identical import unequal

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

ROWS, BATCH, EPOCHS = 64, 16, 3
ACCELERATOR = "gpu"


class Images(L.LightningModule):
    """A small convolutional network, in the memory format and with the optimizer of choice."""

    def __init__(self, channels_last: bool = False, compiled: bool = False, **options: Any) -> None:
        super().__init__()
        self.channels_last, self.options = channels_last, options
        self.net: Any = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
            *(nn.Conv2d(16, 16, 3, 2), nn.GroupNorm(4, 16), nn.GELU(), nn.Flatten(), nn.Linear(144, 5)),
        )
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        if compiled:
            self.net = torch.compile(self.net)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].to(memory_format=torch.channels_last) if self.channels_last else batch[0]
        return nn.functional.cross_entropy(self.net(x), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, **self.options)


def trained(
    callback: InfluenceCallback | None,
    precision: Any,
    epochs: int = EPOCHS,
    more: Any = (),
    ckpt_path: str | None = None,
    **options: Any,
) -> list[Tensor]:
    torch.compiler.reset()
    L.seed_everything(3, verbose=False)
    torch.backends.cudnn.deterministic = True
    module = Images(**options)
    x, y = torch.randn(ROWS + 16, 3, 8, 8), torch.randint(5, (ROWS + 16,))
    rows, held_out = TensorDataset(x[:ROWS], y[:ROWS]), TensorDataset(x[ROWS:], y[ROWS:])
    trainer = L.Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        precision=precision,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=bool(more),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([] if callback is None else [callback]), *more],
    )
    trainer.fit(module, DataLoader(rows, BATCH, shuffle=True), DataLoader(held_out, 16), ckpt_path=ckpt_path)
    return [p.detach().cpu() for p in module.parameters()]


def recording(**options: Any) -> InfluenceCallback:
    return InfluenceCallback(["val", "self"], refresh_every=4, on_error="raise", **options)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "32-true"])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True, "channels_last": True}], ids=str)
def test_training_is_bit_identical_and_every_visit_counts(precision: str, options: dict[str, Any]) -> None:
    influence = recording()
    plain = trained(None, precision, **options)
    recorded = trained(influence, precision, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    report = influence.report
    assert report is not None and not report.run.uncaptured
    skipped = 0 if precision != "16-mixed" else report.run.steps  # the scaler may skip its first steps
    assert (report.observations == EPOCHS).all() or skipped
    assert np.isfinite(report.scores.mu).mean() > 0.9


def test_a_compiled_network_under_the_trainer() -> None:
    influence = recording()
    plain = trained(None, "bf16-mixed", compiled=True, fused=True)
    recorded = trained(influence, "bf16-mixed", compiled=True, fused=True)
    assert influence.report is not None and not influence.report.run.uncaptured
    assert (influence.report.observations == EPOCHS).all()
    for a, b in zip(recorded, plain, strict=True):  # to the bit where the compiler fuses alike
        assert float((a - b).norm()) <= 0.02 * float(b.norm())


def test_chains_sample_on_the_device_and_leave_the_training_alone() -> None:
    influence = recording(methods=[FINE(), BIF(chains=2, draws=20)])
    plain = trained(None, "32-true")
    recorded = trained(influence, "32-true")
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert influence.report is not None
    (found,) = influence.report.stages("BIF")
    assert np.isfinite(found.scores).all()


def test_a_resumed_training_goes_on_with_its_scores(tmp_path: Path) -> None:
    whole = recording()
    trained(whole, "bf16-mixed", 2, [ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)])
    first = min(tmp_path.glob("*.ckpt"))
    again = recording()
    trained(again, "bf16-mixed", 2, ckpt_path=str(first))
    assert isinstance(again.report, InfluenceReport) and isinstance(whole.report, InfluenceReport)
    assert (again.report.observations == 2).all()
    assert set(unequal(again.report, whole.report)) <= {"mu", "se", "p", "q", "t", "p_t", "null_sd", "mean_loss"} | {
        "null_mu",
        "null_ks_p",
        "margins",
        "unit",
        "query_loss",
    }
