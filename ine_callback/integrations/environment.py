"""The callback that ``INE_CALLBACK=1`` adds to every Trainer."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from ine_callback.integrations.callback import InfluenceCallback


class EnvironmentCallback(InfluenceCallback):
    """Records with default options; disables itself where the Trainer has another InfluenceCallback."""

    steps_back = True
    owner = "InfluenceCallback (INE_CALLBACK=1; 0 switches it off)"

    def __init__(self) -> None:
        # a program that does not know of this package finds its logs unchanged
        super().__init__(["val", "self"], log_scores=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, InfluenceCallback) and c is not self]  # type: ignore[attr-defined]
        self.enabled = not others
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.queries = ["val", "self"] if trainer.val_dataloaders else ["self"]
        super().on_train_start(trainer, pl_module)
