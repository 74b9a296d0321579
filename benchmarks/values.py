"""KAIROS: does it find wrong labels, noisy pixels and poisoned rows, and how long does it take?

    python -m benchmarks.values --json values.json

Digits, 1,200 training rows and 300 clean ones as reference; a tenth of the training rows has a wrong label, or pixels
with noise of standard deviation .35, or 30 rows are poisoned as in examples/poison.py. Each seed draws the rows and
trains one network (that of the example, 8 epochs), from whose run mean loss and self-influence come. A score is judged
by AUROC, with the standard error over the seeds. Nothing is tuned. Then the time for 100,000 rows of 64 features
against 1,000. Where opendataval installs (benchmarks/values_peers.py), LAVA and KNN-Shapley of the pixels are beside.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.data import digits
from benchmarks.metrics import Floats, auroc
from benchmarks.network import machine
from benchmarks.values_peers import installed
from ine_callback import FINE, InfluenceCallback
from ine_callback.methods import KAIROS
from ine_callback.methods.kairos.values import DataValues, kairos
from ine_callback.scores import Attribution

ROWS, REFERENCE, BAD, NOISE, POISONED, EPOCHS = 1200, 300, 120, 0.35, 30, 8
KINDS = {"labels": "wrong labels", "noise": "noisy pixels", "poison": "poisoned rows"}
Problem = tuple[Tensor, Tensor, Tensor, Tensor, NDArray[np.bool_]]


class Net(L.LightningModule):
    """The network of examples/poison.py."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.hidden(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def problem(kind: str, seed: int) -> Problem:
    """Training rows x [N, 64] and labels y [N], the reference's, and which training rows are bad [N]."""
    images, classes = digits(None)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(classes), generator=g)
    rows, clean = order[:ROWS], order[ROWS : ROWS + REFERENCE]
    x, y, bad = images[rows].clone(), classes[rows].clone(), torch.zeros(ROWS, dtype=torch.bool)
    if kind == "poison":
        at = torch.where(y != 0)[0][:POISONED]
        x[at[:, None], torch.tensor([0, 1, 8])] = 1.0
        y[at] = 0
    else:
        at = torch.randperm(ROWS, generator=g)[:BAD]
        if kind == "labels":
            y[at] = (y[at] + torch.randint(1, 10, (BAD,), generator=g)) % 10
        else:
            x[at] += NOISE * torch.randn(BAD, 64, generator=g)
    bad[at] = True
    return x, y, images[clean], classes[clean], bad.numpy()


def suspicions(kind: str, seed: int) -> tuple[dict[str, Floats], NDArray[np.bool_]]:
    """How suspicious each score finds the rows [N], and which are bad [N]."""
    x, y, v, yv, bad = problem(kind, seed)
    influence = InfluenceCallback("self", [FINE(), KAIROS(reference=(v, yv))], on_error="raise")
    L.seed_everything(seed, verbose=False)
    quiet: Any = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[influence], enable_model_summary=False, **quiet)
    trainer.fit(Net(), DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
    report = influence.report
    assert report is not None
    values = report.attribution("KAIROS")
    assert values is not None
    found = {"mean loss in the run": report.scores.mean_loss, "self-influence": report.scores.mu[:, 0]}
    found |= parts("penultimate, σ median", values)
    for name, sigma in (("median", "median"), ("3 (published)", 3.0)):
        found |= parts(f"pixels, σ {name}", kairos(x, y, v, yv, sigma=sigma).attribution())
    first = kairos(x, y, v, yv, sigma=3.0, loo=False)
    found["KAIROS first order, pixels, σ 3 (published)"] = -first.values
    found |= {name: -values_of(x, y, v, yv) for name, values_of in installed().items()}
    return found, bad


def parts(name: str, values: Attribution) -> dict[str, Floats]:
    """Suspicions by the official combination, by its parts, and by the p-values."""
    columns = {part: values.columns[part] for part in ("features", "labels", "conformal_p")}
    return {f"KAIROS {name}": -values.scores[:, 0]} | {
        f"KAIROS {name}: {part}": -column[:, 0] for part, column in columns.items()
    }


def detection(kind: str, seeds: int) -> dict[str, Any]:
    """AUROC of every score: mean over the seeds, standard error, each seed's."""
    each: dict[str, list[float]] = {}
    for seed in track(range(seeds), description=KINDS[kind]):
        found, bad = suspicions(kind, seed)
        for name, suspicion in found.items():
            each.setdefault(name, []).append(auroc(suspicion, bad))
    return {
        name: {"auroc": float(np.mean(a)), "se": float(np.std(a, ddof=1) / np.sqrt(len(a))), "each_seed": a}
        for name, a in each.items()
    }


def seconds(rows: int, reference: int, width: int = 64) -> dict[str, float]:
    """CPU seconds for the values, and for the p-values besides, by the exact kernel and by 1,024 frequencies."""
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(n, width, generator=g) for n in (rows, reference))
    taken = {}
    for name, count in (("exact", None), ("random features", 1024)):
        start = time.process_time()
        found: DataValues = kairos(x, None, v, None, lam=1, random_features=count)
        _ = found.values
        taken[name] = time.process_time() - start
        found.conformal_p()
        taken[f"{name}, with p-values"] = time.process_time() - start
    half = kairos(x[: rows // 2], None, v, None, lam=1)
    start = time.process_time()
    half.update(x[rows // 2 : rows // 2 + 100])
    taken["100 rows added to half of them"] = time.process_time() - start
    return taken


def _kairos(x: Tensor, y: Tensor, v: Tensor, yv: Tensor) -> Floats:
    return kairos(x, y, v, yv).values


def beside(seeds: int) -> dict[str, float]:
    """CPU seconds of other libraries over KAIROS's, the median; the first call imports."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds + 1):
        data = problem("labels", seed)[:4]
        taken = {}
        for name, call in ({"KAIROS": _kairos} | installed()).items():
            start = time.process_time()
            call(*data)
            taken[name] = time.process_time() - start
        for name in taken if seed else ():
            found.setdefault(name, []).append(taken[name] / taken["KAIROS"])
    return {name: float(np.median(each)) for name, each in found.items() if name != "KAIROS"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 2,000 rows timed: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    seeds, rows = (2, 2000) if args.quick else (args.seeds, 100_000)
    results: dict[str, Any] = {"protocol": "values", "machine": machine(), "seeds": seeds, "kairos": {}}
    for kind, title in KINDS.items():
        results["kairos"][kind] = detection(kind, seeds)
        print(f"\n{title}, {seeds} seeds: AUROC")
        for name, found in results["kairos"][kind].items():
            print(f"{name:50s}{found['auroc']:.3f} ± {found['se']:.3f}", flush=True)
    results["kairos"]["seconds"] = {"rows": rows, "reference": 1000} | seconds(rows, 1000)
    results["kairos"]["seconds"] |= {f"{name}, times KAIROS": ratio for name, ratio in beside(seeds).items()}
    print("\nCPU seconds, one thread:", {k: round(v, 2) for k, v in results["kairos"]["seconds"].items()})
    args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
