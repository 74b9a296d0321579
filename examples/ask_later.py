"""A question that nobody had during the run: digits with wrong labels, asked about a row that the model gets wrong.

Then the rows that act alike: those nearest to a mislabelled row, near duplicates and weak groups, also in the page.

python examples/ask_later.py --out ask_later
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import GradientStore, InfluenceCallback, InfluenceReport

TRAIN = 1000


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits() -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Training rows of which a tenth have wrong labels, held-out rows, and which labels are wrong."""
    pixels, labels = load_digits(return_X_y=True)
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=g)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    wrong = torch.rand(TRAIN, generator=g) < 0.1
    given = torch.where(wrong, (y[:TRAIN] + torch.randint(1, 10, (TRAIN,), generator=g)) % 10, y[:TRAIN])
    return TensorDataset(x[:TRAIN], given), TensorDataset(x[TRAIN:], y[TRAIN:]), wrong


def main() -> None:
    """Trains with a store, loads the report, and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ask_later"), help="the report's folder")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    L.seed_everything(1, verbose=False)
    train, held_out, wrong = digits()
    influence = InfluenceCallback("val", store=GradientStore(), dirpath=args.out)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[influence],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Net()
    trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(held_out, 256))

    report = InfluenceReport.load(args.out)  # later, anywhere: the report, the module and a question are enough
    x, y = held_out.tensors
    with torch.no_grad():
        loss = nn.functional.cross_entropy(module.net(x), y, reduction="none")
    worst = loss.topk(20).indices
    found = report.ask({f"row {row}": (x[row : row + 1], y[row : row + 1]) for row in worst.tolist()}, module)
    harmful = found.bottom(10, found.queries[0].name)
    print(f"held-out row {worst[0]}, a {y[worst[0]]}: its loss is raised most by the training rows {harmful.tolist()}")
    mean = torch.as_tensor(found.scores).mean(1)
    least = mean.argsort()[:50]
    share = f"{wrong.float().mean():.0%} of all do"
    print(f"of the 50 rows that harm the 20 worst most, {int(wrong[least].sum())} have a wrong label ({share})")

    labels = train.tensors[1]
    row = next(row for row in report.suspect_labels().tolist() if wrong[row])
    near = report.neighbours(row, 5)
    print(f"row {row} is labelled {labels[row]}, wrongly; nearest in gradient space:")
    for other, cosine in zip(near.rows.tolist(), near.cosines, strict=True):
        print(f"    row {other}, labelled {labels[other]}{' wrongly' if wrong[other] else ''}, cosine {cosine:.2f}")
    groups = report.near_duplicates()
    print(f"{sum(map(len, groups))} near duplicates in {len(groups)} groups; {len(report.weak_groups())} weak groups")
    images = TensorDataset(train.tensors[0].view(-1, 1, 8, 8), labels)
    report.write_html(args.out / "report.html", samples=images)  # choose a row there to see those nearest to it


if __name__ == "__main__":
    main()
