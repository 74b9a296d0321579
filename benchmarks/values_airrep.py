"""AirRep: does a learned representation rank subsets as retraining does, better than gradients do, and at what price?

    python -m benchmarks.values_airrep --json values-airrep.json

Digits, 1,000 training rows; an MLP 64-32-10 is trained anew on 400 subsets of 60 rows (150 full-batch steps of Adam,
the same first weights each time), and 400 further rows are the dev rows. A quarter of both, 100 subsets and 100 dev
rows, judges every score by the linear data-modelling score (LDS): the mean over dev rows of Spearman's correlation
between the scores of subsets and the losses after training on them. The encoder sees pixels and label. Each seed draws
the rows, subsets, split and encoder. No setting is tuned on these numbers. Then the price of a score at the size of a
small GPT-2.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.func import grad, vmap
from torch.utils.data import TensorDataset

from benchmarks.airrep_price import prices
from benchmarks.data import digits
from benchmarks.metrics import mean_and_half_width
from benchmarks.network import machine
from ine_callback import AirRep, FeatureEncoder
from ine_callback.methods.airrep.evaluate import Evaluation, lds
from ine_callback.methods.airrep.ranking import pooled
from ine_callback.methods.airrep.split import split

ROWS, CLASSES, HIDDEN, STEPS = 1000, 10, 32, 150
AIRREP, MEAN, UNTRAINED, FISHER = "AirRep", "trained, mean pooling", "untrained encoder", "influence by the Fisher"
GATES = {  # promised by the first reproduction of the paper's claims: the least LDS, or lead over another score
    "AirRep": (AIRREP, None, 0.52),
    "AirRep less the untrained encoder": (AIRREP, UNTRAINED, 0.3),
    "AirRep less mean pooling": (AIRREP, MEAN, 0.1),
    "AirRep less influence by the Fisher": (AIRREP, FISHER, -0.02),
}


@dataclass
class Problem:
    """Rows of digits, and trainings on subsets of them, all subsets as one batched tensor."""

    x: Tensor
    y: Tensor
    dev_x: Tensor
    dev_y: Tensor

    @property
    def rows(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    @property
    def dev(self) -> TensorDataset:
        return TensorDataset(self.dev_x, self.dev_y)

    def train(self, subsets: NDArray[np.int64], seed: int) -> Tensor:
        """Losses of the dev rows [M, D] after training on subsets [M, n]; ``seed`` draws the first weights."""
        first = {name: p.expand(len(subsets), *p.shape).clone() for name, p in network(seed).items()}
        weights = {name: p.requires_grad_() for name, p in first.items()}
        x, y = self.x[torch.from_numpy(subsets)], self.y[torch.from_numpy(subsets)]
        optimizer = torch.optim.Adam(weights.values(), lr=0.01)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits(weights, x).flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            of_dev = logits(weights, self.dev_x).log_softmax(-1)
        return -of_dev.gather(-1, self.dev_y[None, :, None].expand(len(subsets), -1, 1))[..., 0]

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of the rows' and the dev rows' losses [N, P], [D, P], after a training on all rows."""
        weights = {name: p.requires_grad_() for name, p in network(0).items()}
        optimizer = torch.optim.Adam(weights.values(), lr=0.01)
        g = torch.Generator().manual_seed(0)
        for _ in range(60):
            part = torch.randint(ROWS, (128,), generator=g)
            optimizer.zero_grad()
            F.cross_entropy(logits(weights, self.x[part]), self.y[part]).backward()
            optimizer.step()
        trained = {name: p.detach() for name, p in weights.items()}
        each = vmap(grad(lambda w, x, y: F.cross_entropy(logits(w, x), y)), (None, 0, 0))
        found = [each(trained, x, y) for x, y in ((self.x, self.y), (self.dev_x, self.dev_y))]
        rows, dev = (torch.cat([p.flatten(1) for p in parts.values()], 1) for parts in found)
        return rows, dev


def network(seed: int) -> dict[str, Tensor]:
    """First weights of the MLP."""
    g = torch.Generator().manual_seed(7 + seed)
    return {
        "a": torch.randn(64, HIDDEN, generator=g) * 0.15,
        "c": torch.zeros(1, HIDDEN),
        "b": torch.randn(HIDDEN, CLASSES, generator=g) * 0.2,
        "d": torch.zeros(1, CLASSES),
    }


def logits(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Of one network, x [n, 64] or [64]; or of a batch of networks."""
    found = torch.relu(x @ weights["a"] + weights["c"]) @ weights["b"] + weights["d"]
    return found[0] if x.dim() == 1 else found


def problem(seed: int, dev: int) -> Problem:
    x, y = digits(None)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    rows, others = order[:ROWS], order[ROWS : ROWS + dev]
    return Problem(x[rows], y[rows], x[others], y[others])


def pixels(batch: Any) -> Tensor:
    found: Tensor = batch[0]
    return found


def fitted(of: Problem, folder: Path, seed: int, **settings: Any) -> tuple[AirRep, Evaluation]:
    encoder = FeatureEncoder(pixels, of.rows[:64], classes=CLASSES, seed=seed)
    airrep = AirRep(encoder, size=60, dev=of.dev, seed=seed, **settings)
    airrep.collect(of.train, of.rows, folder, at_once=settings["subsets"], progress=False)
    return airrep, airrep.fit(progress=False)


def scored(seed: int, subsets: int, dev: int, steps: int) -> tuple[dict[str, float], float]:
    """LDS of every score, of one seed; and the CPU seconds that collecting and fitting took."""
    of = problem(seed, dev)
    with TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"subsets": subsets, "steps": steps}
        start = time.process_time()
        airrep, evaluation = fitted(of, Path(folder, "one"), seed, **settings)
        seconds = time.process_time() - start
        found = {AIRREP: evaluation.lds, UNTRAINED: evaluation.untrained}
        found[MEAN] = fitted(of, Path(folder, "one"), seed, pooling="mean", **settings)[1].lds
        _, random = fitted(of, Path(folder, "two"), seed, seeds=2, **settings)
        found |= {
            "AirRep, 2 random first weights": random.lds,
            "noise ceiling of 2 random first weights": random.ceiling,
        }
    assert airrep.collected is not None
    parts = split(airrep.collected.losses.mean(1).T, airrep.settings)
    held = torch.from_numpy(airrep.collected.rows)[parts.held_subsets]
    truth = -airrep.collected.losses.mean(1).T[np.ix_(parts.held_queries.numpy(), parts.held_subsets.numpy())]

    def judged(queries: Tensor, rows: Tensor, pooling: Any) -> float:
        return lds(pooled(queries[parts.held_queries], rows[held], pooling).double().numpy(), truth)

    raw = [torch.cat([x, 2 * F.one_hot(y, CLASSES)], 1) for x, y in ((of.dev_x, of.dev_y), (of.x, of.y))]
    centred = [F.normalize(each - raw[1].mean(0), dim=1) for each in raw]
    found["pixels and label, dot product"] = judged(raw[0], raw[1], "mean")
    found["pixels and label, centred cosine"] = judged(centred[0], centred[1], "mean")
    found["pixels and label, centred cosine, attention"] = judged(centred[0], centred[1], "attention")
    rows, queries = of.gradients()
    fisher = rows.T @ rows / len(rows)
    damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(len(fisher))
    whitened = [
        torch.linalg.solve_triangular(torch.linalg.cholesky(damped), g.T, upper=False).T for g in (queries, rows)
    ]
    found["gradients, dot product"] = judged(queries, rows, "mean")
    found[FISHER] = judged(whitened[0], whitened[1], "mean")
    for name, pair in (("gradients", (queries, rows)), (FISHER, whitened)):
        of_unit = [F.normalize(each, dim=1) for each in pair]
        found[f"{name}, cosine"] = judged(of_unit[0], of_unit[1], "mean")
        found[f"{name}, cosine, attention"] = judged(of_unit[0], of_unit[1], "attention")
    return found, seconds


def gates(each: dict[str, list[float]], price: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """What was promised, with the mean over seeds, half its 95 % interval, and whether it was kept."""
    found: dict[str, dict[str, Any]] = {}
    for name, (one, other, least) in GATES.items():
        leads = np.array(each[one]) - (0 if other is None else np.array(each[other]))
        mean, half = mean_and_half_width(leads.tolist())
        found[name] = {"mean": mean, "half_width": half, "least": least, "kept": mean >= least}
    gradient = price["gradient of the row and its product"]["seconds"]
    times = gradient / price["small encoder and dot product"]["seconds"]
    found["times cheaper than a gradient"] = {"mean": times, "half_width": None, "least": 80, "kept": times >= 80}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 60 subsets, a small transformer: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds, subsets, dev, steps = (2, 60, 80, 40) if args.quick else (args.seeds, 400, 400, 400)
    each: dict[str, list[float]] = {}
    seconds = []
    for seed in track(range(seeds), description="seeds"):
        found, taken = scored(seed, subsets, dev, steps)
        seconds.append(taken)
        for name, value in found.items():
            each.setdefault(name, []).append(value)
    print(f"\nLDS over {subsets // 4} subsets, {dev // 4} queries, {seeds} seeds")
    scores = {}
    for name, values in sorted(each.items(), key=lambda pair: -float(np.mean(pair[1]))):
        mean, half = mean_and_half_width(values)
        scores[name] = {"mean": mean, "half_width": half, "each_seed": values}
        print(f"{name:50s}{mean:.3f} ± {half:.3f}")
    price = prices(quick=args.quick)
    for name, cost in price.items():
        print(f"{name:50s}{cost['gflop']:10.3g} GFLOP {1e3 * cost['seconds']:10.3g} ms")
    kept = gates(each, price)
    for name, gate in kept.items():
        print(f"{name:50s}{gate['mean']:.3f}, at least {gate['least']}: {'kept' if gate['kept'] else 'MISSED'}")
    about: dict[str, Any] = {
        "protocol": "values_airrep",
        "machine": machine(),
        "seeds": seeds,
        "subsets": subsets,
        "dev": dev,
    }
    about["seconds"] = float(np.median(seconds))
    args.json.write_text(json.dumps(about | {"scores": scores, "price": price, "gates": kept}, indent=1))


if __name__ == "__main__":
    main()
