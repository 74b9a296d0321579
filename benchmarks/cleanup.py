"""What acting on the report buys: accuracy on clean test data after training again without the rows that it names.

    python -m benchmarks.cleanup --json cleanup.json --data DIR

One run is recorded with the package's defaults. Then the network is trained anew, from other first weights, on the rows
that a score leaves: as many are dropped as ``report.unlike_batch_mates()`` lists, by every score, by the final loss and
at random; and all wrong labels by an oracle. One arm drops nothing and corrects the listed rows' labels where
``report.suggest_labels()`` is at least half sure, from five folds' probabilities; how often it is right is counted too.
The trainings of one seed share first weights, so differences are paired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from torch import nn

from benchmarks.metrics import Floats, mean_and_half_width
from benchmarks.mislabel import Problem, command_line, cross_entropy, network
from benchmarks.network import machine
from ine_callback import InfluenceReport, InfluenceSampler, Query, Recorder
from ine_callback.applications.relabel import LabelSuggestions

NONE, RANDOM, LOSS = "nothing", "random rows", "highest final loss"
REFERENCES = {"minus_none": NONE, "minus_random": RANDOM, "minus_loss": LOSS}
FOLDS = 5
QUERIES = 500  # held-out rows that queries see; the rest is the test


def train(problem: Problem, weights: Floats, seed: int, recorded: bool = False) -> tuple[nn.Module, Recorder | None]:
    """SGD with momentum and a cosine, each row as often in an epoch as its weight says."""
    torch.manual_seed(seed)
    model, sampler = network(problem.x), InfluenceSampler(weights, seed=1000 * seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr, momentum=0.9)
    total = problem.epochs * -(-len(sampler) // 64)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    held_out = (problem.xq[:QUERIES], problem.yq[:QUERIES])
    recorder = Recorder(
        model,
        optimizer,
        len(problem.y),
        {"loss": held_out, "margin": Query.margin(held_out), "self": "self"},
        cross_entropy,
        total_steps=total,
        schedulers=[(cosine, 1)],
        on_error="raise",
    )
    if recorded:
        recorder.start()
    for _ in range(problem.epochs):
        for rows in torch.tensor(list(sampler)).split(64):
            batch = (problem.x[rows], problem.y[rows])
            with recorder.batch(rows, batch):
                loss = cross_entropy(model, batch)
                recorder.see(loss)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            cosine.step()
    recorder.stop()
    return model, recorder if recorded else None


def accuracy(model: nn.Module, problem: Problem) -> float:
    """Share of the test rows, those that no query saw, that the model gets right."""
    with torch.no_grad():
        right = model(problem.xq[QUERIES:]).argmax(1) == problem.yq[QUERIES:]
    return float(right.double().mean())


def dropped(report: InfluenceReport, model: nn.Module, problem: Problem, seed: int) -> dict[str, NDArray[np.int64]]:
    """The rows that each arm drops, of equal number but for the first and the last."""
    listed = report.unlike_batch_mates()
    size = len(listed)
    with torch.no_grad():
        loss = F.cross_entropy(model(problem.x), problem.y, reduction="none").numpy()
    return {
        NONE: listed[:0],
        RANDOM: np.random.default_rng(seed).permutation(report.rows)[:size],
        LOSS: np.argsort(-loss)[:size],
        "self-influence, unlike_batch_mates()": listed,
        "highest mean loss": np.argsort(-report.scores.mean_loss)[:size],
        "harm to the mean margin": report.bottom(size, "margin").rows if size else listed,
        "harm to the mean loss": report.bottom(size, "loss").rows if size else listed,
        "all wrong labels (oracle)": np.flatnonzero(problem.wrong),
    }


def one_seed(problem: Problem, seed: int) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Accuracy, rows dropped and how many of these were wrong, of each arm; and how good suggested labels are."""
    model, recorder = train(problem, np.ones(len(problem.y)), seed, recorded=True)
    assert recorder is not None
    report = recorder.report()
    arms: dict[str, dict[str, Any]] = {}
    for name, rows in dropped(report, model, problem, seed).items():
        weights = np.ones(report.rows)
        weights[rows] = 0.0
        wrong = float(problem.wrong[rows].mean()) if len(rows) else float("nan")
        arms[name] = {"weights": weights, "dropped": float(len(rows)), "wrong": wrong}
    nothing = {"dropped": 0.0, "wrong": float("nan")}
    arms["nothing, weighted by help to the margin"] = nothing | {
        "weights": report.weights(query="margin", strength=0.5)
    }
    found = report.suggest_labels(problem.y.numpy(), out_of_fold(problem, seed))
    corrected = replace(problem, y=torch.tensor(found.corrected(problem.y.numpy())))
    arms["nothing, labels corrected"] = nothing | {"weights": np.ones(report.rows), "problem": corrected}
    for arm in arms.values():
        again, _ = train(arm.pop("problem", problem), arm.pop("weights"), seed + 1_000_000)
        arm["accuracy"] = accuracy(again, problem)
    return arms, suggested(found, problem)


def out_of_fold(problem: Problem, seed: int) -> Floats:
    """Class probabilities of each row [N, C], by a network that was trained on the four fifths without it."""
    fold = np.random.default_rng(seed).integers(FOLDS, size=len(problem.y))
    out = np.zeros((len(fold), 10))
    for k in range(FOLDS):
        model, _ = train(problem, (fold != k).astype(float), seed + 2_000_000 + k)
        with torch.no_grad():
            out[fold == k] = model(problem.x[fold == k]).softmax(1).numpy()
    return out


def suggested(found: LabelSuggestions, problem: Problem) -> dict[str, float]:
    """How many of the proposed labels are the true ones, beside how many should be."""
    right, sure = found.proposed == problem.true.numpy()[found.rows], found.confidence >= 0.5
    wrong = problem.wrong[found.rows]
    return {
        "rows": float(len(found)),
        "right": float(right.sum()),
        "sum of confidences": float(found.confidence.sum()),
        "right where the label is wrong": float(right[wrong].mean()),
        "at least half sure": float(sure.sum()),
        "of these right": float(right[sure].mean()),
        "of these right, expected": float(found.confidence[sure].mean()),
        "noise found": found.noise,
    }


def judge(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Means over seeds, and of the paired differences, with the half widths of their 95 % intervals."""
    out: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        each = [run[name]["accuracy"] for run in runs]
        means = {key: float(np.mean([run[name][key] for run in runs])) for key in ("dropped", "wrong")}
        row: dict[str, Any] = {"each_seed": each, **means}
        row["accuracy"], row["accuracy_half_width"] = mean_and_half_width(each)
        for key, reference in REFERENCES.items():
            pairs = np.subtract(each, [run[reference]["accuracy"] for run in runs]).tolist()
            row[key], row[f"{key}_half_width"] = mean_and_half_width(pairs)
        out[name] = row
    return out


def main(argv: Sequence[str] | None = None) -> None:
    chosen = command_line(__doc__, 5, "300 rows with synthetic flips", argv)
    results: dict[str, Any] = {"protocol": "cleanup", "machine": machine(), "problems": {}}
    for name in chosen.problems:
        problem = chosen.load(name, flips=5000, photos=2000)
        if chosen.quick:
            x, y, true = problem.x[:300], problem.y[:300], problem.true[:300]
            problem = replace(problem, x=x, y=y, true=true, wrong=problem.wrong[:300], epochs=4)
        runs = [one_seed(problem, seed) for seed in track(range(chosen.seeds), description=name)]
        about = {"rows": len(problem.y), "noise": float(problem.wrong.mean()), "tests": len(problem.yq) - QUERIES}
        suggestions = {key: float(np.nanmean([found[key] for _, found in runs])) for key in runs[0][1]}
        arms = judge([arms for arms, _ in runs])
        results["problems"][name] = {**about, "seeds": chosen.seeds, "arms": arms, "suggestions": suggestions}
        chosen.json.write_text(json.dumps(results, indent=1))
        for arm, row in results["problems"][name]["arms"].items():
            found = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
            print(f"{name:18s}{arm:46s}{found}", flush=True)
        print(f"{name:18s}{suggestions}", flush=True)


if __name__ == "__main__":
    main()
