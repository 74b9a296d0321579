"""What several runs buy: coverage of the combined intervals, and what is flagged, on scikit-learn's digits.

    python -m benchmarks.runs --json runs.json [--quick]

30 runs of one network on 500 digits, 10 % wrong labels, 160 steps of SGD. Disjoint combinations of R runs are compared
with the mean of all the others: how often ``mu +- 1.96 se`` holds it, how many rows self-influence lists at q <= .05,
and how many of those are wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn

from benchmarks.data import digits
from ine_callback import InfluenceReport, Query, Recorder

ROWS, QUERIES, WRONG, STEPS, BATCH = 500, 300, 50, 160, 25
SIZES = (1, 2, 3, 5)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor, NDArray[np.bool_]]:
    """Rows x, y with wrong labels, query rows xq, yq, and which labels are wrong."""
    x, y = digits(None)
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=g)
    x, y = x[order], y[order].clone()
    wrong = torch.randperm(ROWS, generator=g)[:WRONG]
    true = y[:ROWS].clone()
    y[wrong] = (y[wrong] + torch.randint(1, 10, (WRONG,), generator=g)) % 10
    query = slice(ROWS, ROWS + QUERIES)
    return x[:ROWS], y[:ROWS], x[query], y[query], (y[:ROWS] != true).numpy()


def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def one_run(seed: int, x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> InfluenceReport:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queries = {"val": (xq, yq), "margin": Query.margin((xq, yq)), "self": "self"}
    recorder = Recorder(model, optimizer, ROWS, queries, loss_of, total_steps=STEPS, on_error="raise")
    with recorder:
        for _ in range(STEPS * BATCH // ROWS):
            for rows in torch.randperm(ROWS).split(BATCH):
                with recorder.batch(rows, (x[rows], y[rows])):
                    loss = loss_of(model, (x[rows], y[rows]))
                    recorder.see(loss)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return recorder.report()


def measure(reports: Sequence[InfluenceReport], size: int, wrong: NDArray[np.bool_]) -> dict[str, float]:
    """Means over disjoint combinations of ``size`` reports."""
    mu = np.stack([report.scores.mu for report in reports])
    rows: dict[str, list[float]] = {}
    for start in range(0, len(reports) - size + 1, size):
        chosen = list(range(start, start + size))
        combined = reports[start] if size == 1 else InfluenceReport.combine([reports[k] for k in chosen])
        others = np.delete(mu, chosen, 0)
        for column, query in enumerate(combined.queries):
            truth = others[:, :, column].mean(0)
            held = np.abs(combined.scores.mu[:, column] - truth) <= 1.96 * combined.scores.se[:, column]
            large = np.abs(truth) >= np.quantile(np.abs(truth), 0.9)
            rows.setdefault(f"coverage, {query}", []).append(float(held.mean()))
            rows.setdefault(f"coverage of the largest tenth, {query}", []).append(float(held[large].mean()))
        listed = combined.drop_list(query="self")
        first = np.argsort(-combined.scores.mu[:, combined.column("self")])[:WRONG]
        rows.setdefault("rows listed", []).append(float(len(listed)))
        rows.setdefault("of them wrong", []).append(float(wrong[listed].sum()))
        rows.setdefault("wrong share of the first 50", []).append(float(wrong[first].mean()))
    return {name: float(np.mean(values)) for name, values in rows.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="6 runs: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    x, y, xq, yq, wrong = problem()
    count = 6 if args.quick else 30
    reports = [one_run(seed, x, y, xq, yq) for seed in track(range(count), description="runs")]
    sizes = {size: measure(reports, size, wrong) for size in SIZES if size < count}
    results: dict[str, Any] = {"protocol": "runs", "runs": count, "wrong": WRONG, "rows": sizes}
    args.json.write_text(json.dumps(results, indent=1))
    for name in sizes[1]:
        print(f"{name:45s}" + "  ".join(f"R={size}: {found[name]:.3g}" for size, found in sizes.items()))


if __name__ == "__main__":
    main()
