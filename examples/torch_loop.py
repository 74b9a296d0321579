"""The same recording without Lightning: a Recorder in a bare PyTorch loop, on digits with 10 % wrong labels.

The report is shown, and kept with --out:

    python examples/torch_loop.py --out torch_loop
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rich
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ine_callback import InfluenceReport, Query, Recorder

TRAIN = 1437
Batch = tuple[Tensor, Tensor]


def noisy_digits(seed: int, share: float = 0.1) -> tuple[Batch, Batch, Tensor]:
    """Training rows with wrong labels, clean validation rows, and which labels are wrong [N]."""
    pixels, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    wrong = torch.rand(TRAIN, generator=generator) < share
    given = torch.where(wrong, (y[:TRAIN] + torch.randint(1, 10, (TRAIN,), generator=generator)) % 10, y[:TRAIN])
    return (x[:TRAIN], given), (x[TRAIN:], y[TRAIN:]), wrong


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of a batch: what training lowers, and what a query on data asks for."""
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(epochs: int, seed: int, size: int = 32) -> list[Tensor]:
    """Dataset indices of every batch of the run, shuffled in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    return [rows for _ in range(epochs) for rows in torch.randperm(TRAIN, generator=generator).split(size)]


def train(
    model: nn.Module, data: Batch, val: Batch, epochs: int = 10, seed: int = 0, enabled: bool = True
) -> tuple[torch.optim.Optimizer, InfluenceReport | None]:
    """A training loop as people write it; only the lines with ``recorder`` are for the report."""
    x, y = data
    optimizer, order = make_optimizer(model), batches(epochs, seed)
    recorder = Recorder(
        model,
        optimizer,
        rows=len(x),
        queries={"val": val, "margin": Query.margin(val), "self": "self"},
        loss=loss_of,
        total_steps=len(order),  # how far ahead the curvature discount looks
    )
    if enabled:
        recorder.start()
    for rows in order:
        batch = x[rows], y[rows]
        with recorder.batch(rows, batch):  # these rows are in the coming forward pass
            loss = loss_of(model, batch)
            recorder.see(loss)  # optional: every row's own loss
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    if not enabled:
        return optimizer, None
    recorder.stop()
    return optimizer, recorder.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the report; by default it is only shown")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is fastest on one core

    data, val, wrong = noisy_digits(args.seed)
    torch.manual_seed(args.seed)
    _, report = train(make_model(), data, val, args.epochs, args.seed)
    assert report is not None
    rich.print(report)
    suspects = report.drop_list()
    found = int(wrong[suspects].sum())
    print(f"{len(suspects)} rows are flagged; they hold {found} of the {int(wrong.sum())} wrong labels.")
    if args.out is not None:
        print(f"Saved: InfluenceReport.load({str(report.save(args.out))!r})")


if __name__ == "__main__":
    main()
