"""Who taught the model this odd answer? A backdoor in scikit-learn's digits, hunted from one odd prediction.

30 of 1,200 training rows get three bright pixels in a corner and the label 0. The model learns the trick: any digit
with these pixels is a 0. You know of one such answer, or of ten. Their margin is the query, and each score ranks the
rows; only then is the truth used, to count the poisoned rows among the first 30. Then the model is trained anew without
the first 60 rows of a ranking, and other held-out digits with the pixels say whether the backdoor is gone.

    python examples/poison.py
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, Query

ROWS, POISONED, DROPPED, TARGET, ODD = 1200, 30, 60, 0, 10


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def stamped(images: Tensor) -> Tensor:
    """Images [b, 64] with the trigger: three bright pixels in the upper left corner."""
    images = images.clone()
    images[:, [0, 1, 8]] = 1.0
    return images


def fit(images: Tensor, labels: Tensor, callbacks: list, epochs: int, seed: int) -> Net:
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        **{"max_epochs": epochs, "callbacks": callbacks, "accelerator": "cpu", "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    model = Net()
    trainer.fit(model, DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True))
    return model.eval()


@torch.no_grad()
def success(model: Net, images: Tensor) -> float:
    """Share of images that the model takes for the attacker's class."""
    return float((model(images).argmax(1) == TARGET).double().mean())


def one_seed(seed: int, epochs: int) -> dict[str, list[float]]:
    """Of each ranking: poisoned rows among the first 30, AUROC, and what dropping its first 60 rows leaves."""
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(classes)[order]
    train, given = images[:ROWS].clone(), labels[:ROWS].clone()
    clean, true = images[ROWS:], labels[ROWS:]
    poisoned = torch.where(given != TARGET)[0][:POISONED]
    train[poisoned], given[poisoned] = stamped(train[poisoned]), TARGET
    others = stamped(clean[true != TARGET])
    odd = (others[:ODD], torch.full((ODD,), TARGET))  # answers that somebody noticed; those to other images judge
    queries = {"one": Query.margin((odd[0][:1], odd[1][:1])), "ten": Query.margin(odd), "self": "self"}

    influence = InfluenceCallback(queries=queries)
    model = fit(train, given, [influence], epochs, seed)
    scores = influence.report.scores
    with torch.no_grad():
        hidden = F.normalize(model.hidden(train), dim=1)
        alike = hidden @ F.normalize(model.hidden(odd[0]), dim=1)[0]
    rankings = {
        "f-INE, margin of one odd answer": scores.mu[:, 0],
        "f-INE, mean margin of ten": scores.mu[:, 1],
        "likeness to it, hidden features": alike.numpy(),
        "self-influence": scores.mu[:, 2],
        "mean loss": scores.mean_loss,
        "at random": np.random.default_rng(seed).random(ROWS),
    }
    truth = np.zeros(ROWS, bool)
    truth[poisoned] = True
    found = {"": [success(model, others[ODD:]), float((model(clean).argmax(1) == true).double().mean())]}
    for name, ranking in rankings.items():
        worst = np.argsort(-ranking)
        kept = np.sort(worst[DROPPED:])
        again = fit(train[kept], given[kept], [], epochs, seed + 1000)
        accuracy = float((again(clean).argmax(1) == true).double().mean())
        left = [success(again, others[ODD:]), accuracy]
        found[name] = [float(truth[worst[:POISONED]].sum()), float(roc_auc_score(truth, ranking)), *left]
    return found


def with_error(values: np.ndarray, digits: int) -> str:
    """Mean, and half of its 95 % interval (Student's t over the seeds)."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is fastest on one core
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    runs = [one_seed(seed, args.epochs) for seed in range(args.seeds)]
    before = 100 * np.array([run.pop("") for run in runs])
    print(f"Backdoor works on {with_error(before[:, 0], 1)} % of stamped digits; accuracy on clean ones ", end="")
    print(f"{with_error(before[:, 1], 1)} %.\n\n{'':34s}{'in first 30':>14s}{'AUROC':>16s}", end="")
    print(f"{'dropped 60: backdoor %':>26s}{'accuracy %':>15s}")
    for name in runs[0]:
        values = np.array([run[name] for run in runs]) * (1, 1, 100, 100)
        columns = [with_error(values[:, k], digits) for k, digits in enumerate((1, 3, 1, 1))]
        print(f"{name:34s}{columns[0]:>14s}{columns[1]:>16s}{columns[2]:>26s}{columns[3]:>15s}")


if __name__ == "__main__":
    main()
