"""What ``report.label_errors()`` lists: on clean data, with labels replaced, and with labels that people got wrong.

    python -m benchmarks.label_errors --json label_errors.json --data DIR [--quick]

Each run is recorded once with the package's defaults. Labels are replaced at random or by the next class ("pair"). A
list is judged by its length, recall and precision, and by its true false-discovery rate beside the one asked for; a
ranking by AUROC. Beside it: the test "unlike its batch-mates", and confident learning (Northcutt et al. 2021) from the
predictions of five folds, which trains five networks more. The rule was chosen on digits and tabular data with the
networks ``deep`` and ``wide``; everything else, marked "held out", was run after it was fixed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.data import digits, folder
from benchmarks.metrics import Floats, auroc
from benchmarks.mislabel import HUMAN, cross_entropy, human
from benchmarks.network import machine
from ine_callback import InfluenceReport, Recorder
from ine_callback.applications.label_errors import suspicion

Bits = NDArray[np.bool_]
BATCH, FOLDS, Q = 32, 5, 0.1
# MNIST's test images whose label fewer than 3 of 5 people confirmed (cleanlab/label-errors, mturk/mnist_mturk.json)
MNIST_ERRORS = (947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729)
NOISES = (
    ("clean", 0.0),
    ("random", 0.02),
    ("random", 0.1),
    ("random", 0.2),
    ("random", 0.4),
    ("pair", 0.1),
    ("pair", 0.2),
)
DEVELOPED = ("digits", "cancer", "gaussians"), ("deep", "wide")


@dataclass(frozen=True)
class Case:
    """One training: data with labels, of which ``wrong`` are replaced; how it is trained."""

    data: str
    noise: str
    share: float
    network: str
    epochs: int
    seed: int
    x: Tensor
    y: Tensor
    wrong: Bits
    batch: int = BATCH

    @property
    def about(self) -> dict[str, Any]:
        developed = self.data in DEVELOPED[0] and self.network in DEVELOPED[1]
        names = ("data", "noise", "share", "network", "epochs", "seed")
        return {name: getattr(self, name) for name in names} | {"held_out": not developed, "rows": len(self.y)}


def deep(x: Tensor, classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, classes))
    )


def wide(x: Tensor, classes: int) -> nn.Module:
    first = (nn.Linear(x.shape[1], 512), nn.LayerNorm(512), nn.GELU())
    return nn.Sequential(*first, nn.Linear(512, 512), nn.GELU(), nn.Linear(512, classes))


def tanh(x: Tensor, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(x.shape[1], 200), nn.Tanh(), nn.Linear(200, classes))


def convolutions(x: Tensor, classes: int) -> nn.Module:
    channels, side = x.shape[1], x.shape[2] // 4
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * side * side, classes)),
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


Maker = tuple[Callable[[Tensor, int], nn.Module], Callable[[nn.Module], torch.optim.Optimizer]]
NETWORKS: dict[str, Maker] = {
    "deep": (deep, sgd),
    "wide": (wide, adamw),
    "tanh": (tanh, sgd),
    "deep, AdamW": (deep, adamw),
    "convolutions": (convolutions, adamw),
}


def replaced(y: Tensor, noise: str, share: float, seed: int) -> tuple[Tensor, Bits]:
    """Labels of which a share is another class, at random or the next one; and which."""
    random, classes = np.random.default_rng(seed + 100), int(y.max()) + 1
    chosen = random.random(len(y)) < share
    step = random.integers(1, classes, len(y)) if noise == "random" else np.ones(len(y), dtype=np.int64)
    new = np.where(chosen, (y.numpy() + step) % classes, y.numpy())
    return torch.tensor(new), chosen


def table(name: str) -> tuple[Tensor, Tensor]:
    """Breast cancer (scikit-learn), or five overlapping classes of two Gaussian clusters each."""
    from sklearn.datasets import load_breast_cancer, make_classification

    if name == "cancer":
        x, y = load_breast_cancer(return_X_y=True)
    else:
        form = {"n_informative": 10, "n_redundant": 0, "n_classes": 5, "n_clusters_per_class": 2, "flip_y": 0}
        x, y = make_classification(3000, 20, class_sep=1.0, random_state=1, **form)
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32), torch.tensor(y).long()


def load(name: str, where: Path | None) -> tuple[Tensor, Tensor]:
    """Rows and labels of a data set without replaced labels."""
    if name in ("cancer", "gaussians"):
        return table(name)
    x, y = digits(where if name == "MNIST" else None)
    count = 4000 if name == "MNIST" else 1437
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    return x[rows], y[rows]


def noisy(where: Path | None, quick: bool) -> Iterator[Case]:
    """Clean data and replaced labels."""
    sets = {
        "digits": ("deep", "wide", "tanh", "deep, AdamW"),
        "cancer": ("deep", "wide"),
        "gaussians": ("deep", "wide"),
    }
    sets = {"digits": ("wide",)} if quick else sets | ({"MNIST": ("deep", "wide")} if where is not None else {})
    for data, networks in sets.items():
        x, true = load(data, where)
        for network in networks:
            for noise, share in NOISES[:2] if quick else NOISES:
                if noise == "pair" and int(true.max()) == 1:
                    continue  # with two classes the next one is a random one
                for epochs, seed in ((3, 0),) if quick else lengths(data, network, noise, share):
                    y, wrong = replaced(true, noise, share, seed)
                    yield Case(data, noise, share, network, epochs, seed, x, y, wrong)


def lengths(data: str, network: str, noise: str, share: float) -> list[tuple[int, int]]:
    """Epochs and seeds: two seeds where networks were held out, long training where it is cheap."""
    if data == "MNIST":
        return [(10, 0)] if network == "deep" else [(3, 0)]
    if data == "gaussians":
        return [(3, 0), (10, 0)]
    long = [(30, 0)] if noise != "pair" and share <= 0.1 else []
    seeds = (0,) if network in DEVELOPED[1] else (0, 1)
    return [(epochs, seed) for epochs in (1, 3, 10) for seed in seeds] + long


def random_labels(quick: bool) -> Iterator[Case]:
    """1,000 digits whose labels are all drawn at random."""
    x, true = load("digits", None)
    for network in ("wide",) if quick else ("deep", "wide"):
        for epochs in (3,) if quick else (1, 3, 10, 30):
            y = torch.tensor(np.random.default_rng(0).integers(0, 10, 1000))
            yield Case("digits", "all random", 1.0, network, epochs, 0, x[:1000], y, (y != true[:1000]).numpy())


def people(where: Path | None, seeds: int) -> Iterator[Case]:
    """Labels that people got wrong: MNIST's confirmed errors, and CIFAR-10N."""
    if where is None:
        return
    x, y = digits(where)
    wrong = np.isin(np.arange(len(y)), MNIST_ERRORS)
    for network in ("deep", "convolutions"):
        shaped = x.unflatten(1, (1, 28, 28)) if network == "convolutions" else x
        for seed in range(seeds):
            yield Case("MNIST, confirmed errors", "people", 0.0015, network, 10, seed, shaped, y, wrong)
    for name in ("cifar10n-worse", "cifar10n-aggre"):
        problem = human(where, HUMAN[name], rows=6000, held_out=1)
        share = float(problem.wrong.mean())
        for seed in range(seeds):
            at = (name, "people", share, "convolutions", problem.epochs, seed)
            yield Case(*at, problem.x, problem.y, problem.wrong, 64)


def batches(case: Case, rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(case.epochs):
        for chosen in torch.randperm(len(rows), generator=generator).split(case.batch):
            yield rows[chosen]


def trained(case: Case, rows: Tensor, recorded: bool) -> tuple[nn.Module, Recorder | None]:
    """The network trained on these rows, with a cosine schedule."""
    torch.manual_seed(case.seed)
    make, optimizer_of = NETWORKS[case.network]
    model = make(case.x, int(case.y.max()) + 1)
    optimizer, steps = optimizer_of(model), case.epochs * -(-len(rows) // case.batch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    recorder = None
    if recorded:
        recorder = Recorder(
            *(model, optimizer, len(case.y), {"self": "self"}, cross_entropy),
            total_steps=steps,
            schedulers=[(cosine, 1)],
            on_error="raise",
        )
        recorder.start()
    for chosen in batches(case, rows, torch.Generator().manual_seed(case.seed)):
        batch = (case.x[chosen], case.y[chosen])
        if recorder is None:
            cross_entropy(model, batch).backward()
        else:
            with recorder.batch(chosen, batch):
                loss = cross_entropy(model, batch)
                recorder.see(loss)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cosine.step()
    if recorder is not None:
        recorder.stop()
    return model, recorder


def judged(listed: NDArray[np.int64], wrong: Bits) -> dict[str, float]:
    """A list's length, recall and precision; NaN without a wrong label, or an empty list."""
    found = int(wrong[listed].sum())
    return {
        "listed": len(listed) / len(wrong),
        "recall": found / int(wrong.sum()) if wrong.any() else float("nan"),
        "precision": found / len(listed) if len(listed) else float("nan"),
    }


def recorded(case: Case) -> dict[str, Any]:
    """Lists and rankings of one recorded run."""
    model, recorder = trained(case, torch.arange(len(case.y)), True)
    assert recorder is not None
    report: InfluenceReport = recorder.report()
    found, scores = report.label_errors(Q), report.scores
    strict = report.label_errors(Q / 2)
    out: dict[str, Any] = case.about | {
        "list": judged(found.rows, case.wrong) | {"rate": found.rate, "noise": found.noise, "visits": found.visits},
        "strict": judged(strict.rows, case.wrong),
        "unlike": judged(report.unlike_batch_mates(), case.wrong),
        "note": found.note,
    }
    with torch.no_grad():
        final = F.cross_entropy(model(case.x), case.y, reduction="none").double().numpy()
    ranks = {
        "suspicion": suspicion(scores),
        "mean loss": scores.mean_loss,
        "final loss": final,
        "self": scores.mu[:, 0],
    }
    seen = np.isfinite(scores.mean_loss)
    if case.wrong.any() and not case.wrong.all():
        out["auroc"] = {name: auroc(rank[seen], case.wrong[seen]) for name, rank in ranks.items()}
    return out


def confident_learning(case: Case) -> dict[str, Any]:
    """Rows that are confidently another class by the predictions of five folds; ranked by the label's probability."""
    y, p = case.y.numpy(), np.zeros((len(case.y), int(case.y.max()) + 1))
    fold = np.random.default_rng(case.seed).permutation(len(y)) % FOLDS
    for k in range(FOLDS):
        model, _ = trained(case, torch.tensor(np.flatnonzero(fold != k)), False)
        with torch.no_grad():
            p[fold == k] = model(case.x[fold == k]).softmax(1).numpy()
    level = np.array([p[y == c, c].mean() if (y == c).any() else np.inf for c in range(p.shape[1])])
    sure = np.where(p >= level, p, -1.0)
    listed = np.flatnonzero((sure.max(1) > 0) & (sure.argmax(1) != y))
    rank: Floats = -p[np.arange(len(y)), y]
    out: dict[str, Any] = {"list": judged(listed, case.wrong)}
    if case.wrong.any():
        out["auroc"] = auroc(rank, case.wrong)
    return out


def line(run: dict[str, Any]) -> str:
    """One run in a line."""
    head = f"{run['data']:24s}{run['noise']:11s}{run['share']:5.2f} {run['network']:13s}{run['epochs']:3d} epochs"
    parts = [f"{name} " + " ".join(f"{run[name][k]:.3f}" for k in ("listed", "recall", "precision")) for name in SHOWN]
    rank = " ".join(f"{name} {value:.3f}" for name, value in run.get("auroc", {}).items())
    other = run.get("confident learning")
    more = "" if other is None else "  CL " + " ".join(f"{value:.3f}" for value in other["list"].values())
    return f"{head}  {'  '.join(parts)}{more}  {rank}"


SHOWN = ("list", "unlike")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument(
        "--data", help="folder with mnist10k.npz and cifar10n.npz (or INE_DATA); else scikit-learn's alone"
    )
    parser.add_argument("--quick", action="store_true", help="a few small runs: to see it work")
    parser.add_argument("--only", nargs="+", help="data sets by name; by default all")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="by default all")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    where, runs, start = None if args.quick else folder(args.data), [], time.time()
    for case in itertools.chain(people(where, 2), noisy(where, args.quick), random_labels(args.quick)):
        if case.network not in args.networks or (args.only and case.data not in args.only):
            continue
        run = recorded(case)
        if case.seed == 0 and case.noise != "all random" and (case.epochs in (10, 12) or args.quick):
            run["confident learning"] = confident_learning(case)
        runs.append(run)
        print(line(run), flush=True)
        results = {
            "protocol": "label_errors",
            "machine": machine(),
            "q": Q,
            "seconds": time.time() - start,
            "runs": runs,
        }
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
