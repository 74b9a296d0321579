"""A Hydra app on scikit-learn's digits: hydra/config.yaml names trainer, callback, model and data.

Train with the report, without it, with other settings, and with several seeds:

    python examples/hydra_train.py
    python examples/hydra_train.py influence.enabled=false
    python examples/hydra_train.py trainer.max_epochs=10 "influence.queries=[self, val]"
    python examples/hydra_train.py --multirun seed=1,2,3
"""

from __future__ import annotations

import hydra
import lightning as L
import rich
import torch
from digits import noisy_digits
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import DataLoader


class DigitsData(L.LightningDataModule):
    """scikit-learn's digits, 10 % of the training labels wrong."""

    def __init__(self, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train, self.val, _ = noisy_digits(seed)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 256)


@hydra.main(config_path="hydra", config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    torch.set_num_threads(1)  # so small a model is fastest on one core
    L.seed_everything(config.seed, verbose=False)
    influence = instantiate(config.influence)
    trainer = instantiate(config.trainer)(callbacks=[influence])
    trainer.fit(instantiate(config.model), datamodule=instantiate(config.data))
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    print(f"Validation accuracy {accuracy!r} after {trainer.global_step} steps.")
    if config.influence.enabled:
        rich.print(influence.report.top(5, "self"))
        print(f"Written to {config.influence.dirpath}")
    else:
        print("Not recorded.")


if __name__ == "__main__":
    main()
