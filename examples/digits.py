"""Finds wrong labels in handwritten digits while a small CNN learns them.

10 % of the training labels are replaced by a wrong class. The CNN is trained once with InfluenceCallback and the report
says which rows to look at; only then is the truth used, to check the answer. A second training without the callback
shows that recording changed nothing: all weights are the same, bit by bit.

    python examples/digits.py --out demo
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import rich
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import BIF, FINE, InfluenceCallback, Query


class DigitsCNN(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
            *(nn.Dropout(0.2), nn.Linear(512, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def noisy_digits(seed: int, share: float = 0.1) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Training set with wrong labels, clean validation set, and the true labels of the training set."""
    pixels, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    true = torch.tensor(labels)[order]
    train, val = slice(0, 1437), slice(1437, None)
    given = true[train].clone()
    wrong = torch.randperm(len(given), generator=generator)[: int(share * len(given))]
    given[wrong] = (given[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return TensorDataset(images[train], given), TensorDataset(images[val], true[val]), true[train]


def fit(train: TensorDataset, val: TensorDataset, callbacks: list, epochs: int, seed: int) -> tuple[L.Trainer, float]:
    """One training run; returns its trainer and its seconds."""
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        **{"max_epochs": epochs, "callbacks": callbacks, "accelerator": "cpu", "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    model, began = DigitsCNN(), time.perf_counter()
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=256))
    return trainer, time.perf_counter() - began


def state(trainer: L.Trainer) -> Tensor:
    """All that training leaves behind as one vector: weights, buffers, optimizer state, metrics, random state."""
    model, optimizer = trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict()
    leaves = tree_leaves([model, optimizer, trainer.callback_metrics, torch.get_rng_state()])
    return torch.cat([leaf.double().flatten() for leaf in leaves if isinstance(leaf, Tensor)])


def drawing(images: Tensor, rows: np.ndarray, labels: Tensor, most: int = 4) -> str:
    """The first rows' images [1, 8, 8] side by side, two characters a pixel, with their labels."""
    columns = []
    for row in rows[:most].tolist():
        shaded = ["".join(2 * " ░▒▓█"[round(4 * p)] for p in line) for line in images[row, 0].tolist()]
        columns.append([*shaded, f"row {row}: a {labels[row]}?".ljust(16)])
    return "\n".join("    ".join(parts).rstrip() for parts in zip(*columns, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--bif", action="store_true", help="chains at the end too, on 300 rows (some minutes)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is fastest on one core
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    train, val, true = noisy_digits(args.seed)
    images, given = train.tensors
    wrong = (given != true).numpy()
    print(f"Training on {len(given):,} digits, {wrong.sum()} of them with a wrong label; the model is not told which.")

    methods = [FINE(), BIF(chains=4, draws=100, rows=300)] if args.bif else None
    influence = InfluenceCallback(["val", Query.margin("val"), "self"], methods, dirpath=args.out)
    trainer, seconds = fit(train, val, [influence], args.epochs, args.seed)
    report, recorded = influence.report, state(trainer)
    print(f"Trained in {seconds:.1f} s to a validation accuracy of {trainer.callback_metrics['val_accuracy']:.1%}.\n")

    rich.print(report.top(10, report.recommended_query))
    suspects = report.drop_list()  # the rows to look at, worst first
    print(drawing(images, suspects, given))
    print(f"\n{len(suspects)} rows are flagged: {suspects[:12].tolist()} …")
    print(f"The truth: {wrong[suspects].sum()} of them have a wrong label, of {wrong.sum()} in all.\n")

    with torch.no_grad():
        final_loss = F.cross_entropy(trainer.lightning_module.eval()(images), given, reduction="none")
    mu = {query: report.scores.mu[:, report.column(query)] for query in report.queries}
    ranking = mu[report.recommended_query]
    candidates = {  # the higher, the more suspect
        "auroc_influence": ("self-influence, whose test says where to stop", ranking),
        "auroc_margin": ("harm to the margin on the validation set", -mu["margin"]),
        "auroc_loss": ("loss of the trained model, for free", final_loss),
        "auroc_mean_loss": ("loss averaged over the run, for free in every report", report.scores.mean_loss),
    }
    summary = {key: float(roc_auc_score(wrong, score)) for key, (_, score) in candidates.items()}
    print("How well scores tell wrong from right labels (AUROC: 1 always, 0.5 by chance):")
    print("\n".join(f"    {summary[key]:.4f}  {meaning}" for key, (meaning, _) in candidates.items()))

    if report.stages("BIF"):
        state_of_chains = "passed all checks" if report.bif.reliable else f"are UNRELIABLE: {report.bif.reasons}"
        bif, rows = report.bif.scores[:, report.bif.column("margin")], report.bif.rows
        agreement = spearmanr(bif, mu["margin"][rows]).statistic
        print(f"\nThe chains {state_of_chains}. On {len(rows)} rows BIF ranks harm to the margin like f-INE to")
        print(f"{agreement:.2f}; AUROC for wrong labels {roc_auc_score(wrong[rows], -bif):.3f}.")

    plain, seconds_plain = fit(train, val, [], args.epochs, args.seed)
    summary |= {
        "precision_at_flips": float(wrong[np.argsort(-ranking)[: wrong.sum()]].mean()),
        "flagged": len(suspects),
        "null_ks_p": float(report.scores.null_ks_p[report.column(report.recommended_query)]),
        **{"seconds_fit": round(seconds, 2), "seconds_fit_plain": round(seconds_plain, 2)},
        "params_identical": torch.equal(recorded, state(plain)),
    }
    same = "the same, bit by bit" if summary["params_identical"] else "DIFFERENT: please report this"
    print(f"\nTrained again without the callback, in {seconds_plain:.1f} s: weights, optimizer and logs are {same}.")
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"Written to {args.out}: report.html (open it in a browser), scores.parquet, summary.json")


if __name__ == "__main__":
    main()
