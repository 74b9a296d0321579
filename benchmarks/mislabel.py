"""Which score finds wrong labels: human ones (CIFAR-10N) and synthetic flips, beside the free baselines.

    python -m benchmarks.mislabel --json mislabel.json --data DIR

Every run is recorded once with the package's defaults. A score is judged by AUROC, average precision and recall at the
noise rate, and by the difference of the AUROCs to the mean loss in the run, which the package recommends; and by how
alike two seeds rank and choose (Spearman, Jaccard of the most suspicious 10 % and 20 %).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.data import digits, folder
from benchmarks.metrics import Floats, auroc, jaccard, mean_and_half_width
from benchmarks.network import machine
from ine_callback import Query, Recorder

HUMAN = {"cifar10n-aggre": "aggre_label", "cifar10n-random1": "random_label1", "cifar10n-worse": "worse_label"}
SELF = "self-influence"
RECOMMENDED = "mean loss in the run"
TRACIN_CHECKPOINTS = 4


@dataclass(frozen=True)
class Problem:
    """Rows x with labels y, of which ``wrong`` are not the ``true`` ones; held-out xq with true labels yq."""

    x: Tensor
    y: Tensor
    true: Tensor
    wrong: NDArray[np.bool_]
    xq: Tensor
    yq: Tensor
    epochs: int
    lr: float


def flipped(where: Path | None, share: float = 0.2, held_out: int = 500) -> Problem:
    """Digits with a share of the labels replaced by another class; fewer are held out where there are fewer."""
    x, true = digits(where)
    g = torch.Generator().manual_seed(5)
    order = torch.randperm(len(x), generator=g)
    n = min(5000, len(x) * 2 // 3)
    rows, query = order[:n], order[n : n + held_out]
    wrong = torch.rand(n, generator=g) < share
    y = torch.where(wrong, (true[rows] + torch.randint(1, 10, (n,), generator=g)) % 10, true[rows])
    return Problem(x[rows], y, true[rows], wrong.numpy(), x[query], true[query], 10, 0.05)


def human(where: Path, column: str, rows: int = 4000, held_out: int = 500) -> Problem:
    """CIFAR-10 images with labels by people (CIFAR-10N), at half the resolution: 16 x 16."""
    raw = np.load(where / "cifar10n.npz")
    clean = torch.tensor(raw["clean_label"][:rows]).long()
    y = torch.tensor(raw[column][:rows]).long()
    x = images(raw["train_jpeg"], raw["train_offsets"], range(rows))
    # the file has them sorted by class: the first of them would be a question about few classes
    asked = np.random.default_rng(5).permutation(len(raw["test_label"]))[:held_out].tolist()
    xq, yq = images(raw["test_jpeg"], raw["test_offsets"], asked), torch.tensor(raw["test_label"][asked]).long()
    return Problem(x, y, clean, (y != clean).numpy(), xq, yq, 12, 0.05)


def images(jpeg: NDArray[np.uint8], offsets: NDArray[np.int64], which: Sequence[int]) -> Tensor:
    """Decoded images [n, 3, 16, 16], centred and scaled."""
    from PIL import Image

    out = np.stack([np.asarray(Image.open(io.BytesIO(jpeg[offsets[k] : offsets[k + 1]].tobytes()))) for k in which])
    return F.avg_pool2d((torch.tensor(out, dtype=torch.float32).permute(0, 3, 1, 2) / 255 - 0.47) / 0.25, 2)


def network(x: Tensor) -> nn.Module:
    """A multilayer perceptron for digits, a small convolutional network for images."""
    if x.dim() == 2:
        return nn.Sequential(*(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)))
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(768, 10)),
    )


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def one_run(seed: int, problem: Problem) -> dict[str, Floats]:
    """Suspicions [N] of every score, from one training."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model, n, b = network(problem.x), len(problem.y), 64
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr, momentum=0.9)
    total = problem.epochs * -(-n // b)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    held_out = (problem.xq, problem.yq)
    queries = {"loss": held_out, "margin": Query.margin(held_out), "self": "self"}
    recorder = Recorder(
        model,
        optimizer,
        n,
        queries,
        cross_entropy,
        total_steps=total,
        schedulers=[(cosine, 1)],
        on_error="raise",
    )
    margins, tracin = torch.zeros(n), torch.zeros(n)
    with recorder:
        for epoch in range(problem.epochs):
            for rows in torch.randperm(n, generator=g).split(b):
                with recorder.batch(rows, (problem.x[rows], problem.y[rows])):
                    logits = model(problem.x[rows])
                    loss = F.cross_entropy(logits, problem.y[rows])
                    recorder.see(loss)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                cosine.step()
                own = problem.y[rows, None]
                other = logits.detach().scatter(1, own, -torch.inf).amax(1)
                margins[rows] += logits.detach().gather(1, own)[:, 0] - other
            if (epoch + 1) % (problem.epochs // TRACIN_CHECKPOINTS) == 0:
                tracin += optimizer.param_groups[0]["lr"] * squared_gradients(model, problem)
    scores = recorder.report().scores
    with torch.no_grad():
        final = F.cross_entropy(model(problem.x), problem.y, reduction="none").double().numpy()
    return {
        SELF: scores.mu[:, 2],
        "harm to the mean margin": -scores.mu[:, 1],
        "harm to the mean loss": -scores.mu[:, 0],
        "final loss": final,
        "mean loss in the run": scores.mean_loss,
        "area under the margin": -margins.double().numpy(),
        f"TracIn with itself, {TRACIN_CHECKPOINTS} checkpoints": tracin.double().numpy(),
    }


def squared_gradients(model: nn.Module, problem: Problem, together: int = 250) -> Tensor:
    """Squared norm of every row's gradient [N]: TracIn's score of a row on itself at one checkpoint."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    each = vmap(grad(loss), in_dims=(None, 0, 0))
    found = [
        torch.stack([g.flatten(1).square().sum(1) for g in each(parameters, x, y).values()]).sum(0)
        for x, y in zip(problem.x.split(together), problem.y.split(together), strict=True)
    ]
    return torch.cat(found)


def judge(runs: Sequence[Floats], wrong: NDArray[np.bool_]) -> dict[str, Any]:
    """Quality of one score over seeds, with the half width of its 95 % interval (t over seeds), and stability."""
    count = int(wrong.sum())
    each = {
        "auroc": [auroc(s, wrong) for s in runs],
        "average_precision": [float(average_precision_score(wrong, s)) for s in runs],
        "recall_at_noise_rate": [float(wrong[np.argsort(-s)[:count]].mean()) for s in runs],
    }
    out: dict[str, Any] = {"each_seed": each}
    for name, values in each.items():
        out[name], out[f"{name}_half_width"] = mean_and_half_width(values)
    pairs = list(itertools.combinations(runs, 2))
    out["seed_spearman"] = float(np.mean([spearmanr(a, b)[0] for a, b in pairs]))
    for share in (10, 20):
        out[f"jaccard_top{share}"] = float(np.mean([jaccard(a, b, share / 100) for a, b in pairs]))
    return out


class Chosen(NamedTuple):
    """What the command line asks for: files, problems by name, seeds, and whether it is only to see it work."""

    json: Path
    where: Path | None
    problems: list[str]
    seeds: int
    quick: bool

    def load(self, name: str, flips: int = 500, photos: int = 500) -> Problem:
        """The problem of that name, with so many digits or photographs held out."""
        if self.where is None or name == "flips":
            return flipped(self.where, held_out=flips)
        return human(self.where, HUMAN[name], held_out=photos)


def command_line(about: str | None, seeds: int, quick: str, argv: Sequence[str] | None) -> Chosen:
    """Reads the command line of a benchmark on these problems; one thread from here on."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--data", help="folder with mnist10k.npz and cifar10n.npz (or INE_DATA); else digits alone")
    parser.add_argument("--problems", nargs="+", choices=["flips", *HUMAN], help="some of them; by default all")
    parser.add_argument("--seeds", type=int, default=seeds, help="runs of each problem (at least 2)")
    parser.add_argument("--quick", action="store_true", help=f"{quick}, 2 seeds: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    where = folder(args.data)
    problems = ["flips"] if args.quick or where is None else args.problems or ["flips", *HUMAN]
    return Chosen(args.json, where, problems, 2 if args.quick else args.seeds, args.quick)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = command_line(__doc__, 4, "synthetic flips alone", argv)
    results: dict[str, Any] = {"protocol": "mislabel", "machine": machine(), "problems": {}}
    for name in chosen.problems:
        problem = chosen.load(name)
        runs = [one_run(seed, problem) for seed in track(range(chosen.seeds), description=name)]
        rows = {score: judge([run[score] for run in runs], problem.wrong) for score in runs[0]}
        for row in rows.values():
            differences = np.subtract(rows[RECOMMENDED]["each_seed"]["auroc"], row["each_seed"]["auroc"])
            row["mean_loss_minus_this"], row["mean_loss_minus_this_half_width"] = mean_and_half_width(
                differences.tolist()
            )
        about = {"rows": len(problem.y), "noise": float(problem.wrong.mean()), "seeds": chosen.seeds}
        results["problems"][name] = {**about, "scores": rows}
        chosen.json.write_text(json.dumps(results, indent=1))
        for score, row in rows.items():
            found = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float))
            print(f"{name:18s}{score:26s}{found}", flush=True)


if __name__ == "__main__":
    main()
