"""How well scores foretell retraining on halves: rank (LDS) with an interval, and size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.finetuning.scores import Scores
from benchmarks.finetuning.truth import Truth
from benchmarks.metrics import Floats, per_query_spearman

DRAWS = 300


def judge(runs: Sequence[Scores], truth: Truth) -> dict[str, object]:
    """One row of the table: a score in several runs.

    Returns:
        ``lds``, the mean over runs, with its 95 % interval over queries and halves; ``mean_of_runs``, that of the runs'
        mean score; ``slope_loss`` and ``slope_sd``, the truth's slope on the score in units of the loss and in standard
        deviations over trainings, where the score has them.
    """
    each = [lds(run.values, truth) for run in runs]
    together = np.mean([run.values / run.values.std() for run in runs], 0)
    found: dict[str, object] = {
        "lds": float(np.mean(each)),
        "lds_runs": each,
        "interval": interval([run.values for run in runs], truth),
        "mean_of_runs": lds(together, truth),
        "seconds": float(np.median([run.seconds for run in runs])),
    }
    if all(run.loss is not None for run in runs):
        found["slope_loss"] = float(np.mean([slope(run.loss, truth.outcome, truth) for run in runs]))
    if all(run.in_sd for run in runs):
        found["slope_sd"] = float(np.mean([slope(run.values, truth.outcome / truth.sd, truth) for run in runs]))
    return found


def lds(scores: Floats, truth: Truth) -> float:
    """Mean over queries of the Spearman correlation over halves of the sum of scores with the outcome."""
    return per_query_spearman(truth.masks @ scores, truth.outcome)


def interval(runs: Sequence[Floats], truth: Truth) -> list[float]:
    """95 % bootstrap interval of the mean LDS over draws of halves and of queries."""
    rng, sums, outcome = np.random.default_rng(0), [truth.masks @ scores for scores in runs], truth.outcome
    found = []
    for _ in range(DRAWS):
        h, q = (rng.integers(0, size, size) for size in outcome.shape)
        found.append(np.mean([per_query_spearman(each[h][:, q], outcome[h][:, q]) for each in sums]))
    low, high = np.quantile(found, [0.025, 0.975])
    return [float(low), float(high)]


def slope(scores: Floats | None, outcome: Floats, truth: Truth) -> float:
    """Slope of the outcome on the scores' sums, both less their means over halves; below 1: scores are too large.

    Halves differ in what is in them and not in size, so their common part is not foretold.
    """
    estimate = truth.masks @ np.asarray(scores)
    estimate = estimate - estimate.mean(0)
    return float((estimate * outcome).sum() / (estimate**2).sum())
