"""Does leaving rows out do what the scores say? Retraining to convergence without a row or a group of rows.

Logistic regression of even against odd digits (n = 200, d = 64, no intercept), in float64 by Newton's method. Each
weight is a query, so the scores are the change of the weights, and the change of any function follows without another
approximation. The regulariser stays as it is when rows go.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.influence.shared import PIXELS, context_of, relative_error, scored, shuffled_digits, slope
from benchmarks.metrics import Floats
from ine_callback import IF
from ine_callback.queries import CallableQuery

ROWS, TEST = 200, slice(1400, None)
RIDGES = (1e-4, 1e-3)  # of the mean loss
SIZES, REPEATS = 10, 3  # of groups from 0.5 to 5 % of the rows
GRADIENT = 1e-12  # at which a fit has converged


def weight(k: int) -> CallableQuery:
    """A weight of a linear module as a query."""
    return CallableQuery(lambda module, _: next(module.parameters())[0, k], (torch.zeros(1, PIXELS),))


def bits(module: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(module(batch[0])[:, 0], batch[1])


def fitted(x: Tensor, y: Tensor, kept: Tensor, ridge: float, start: Tensor) -> Tensor:
    """Weights [T, d] that minimise ``1/n sum of kept losses + ridge/2 |w|^2`` for each of T choices of rows [T, n].

    Raises:
        RuntimeError: If the gradient is not below GRADIENT after 200 steps.
    """
    w, count = start.clone(), len(y)

    def objective(w: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(w @ x.T, y.expand(len(w), -1), reduction="none")
        return (kept * losses).sum(1) / count + ridge / 2 * w.square().sum(1)

    for _ in range(200):
        p = torch.sigmoid(w @ x.T)
        gradient = (kept * (p - y)) @ x / count + ridge * w
        if float(gradient.abs().max()) < GRADIENT:
            return w
        hessian = (x.T * (kept * p * (1 - p))[:, None]) @ x / count + ridge * torch.eye(x.shape[1]).to(x)
        step, length, now = torch.linalg.solve(hessian, gradient), torch.ones(len(w), 1).to(w), objective(w)
        for _ in range(40):
            longer = objective(w - length * step) > now + 1e-15
            if not bool(longer.any()):
                break
            length = torch.where(longer[:, None], length / 2, length)
        w = w - length * step
    raise RuntimeError(f"logistic regression has a gradient of {float(gradient.abs().max()):.1e} after 200 steps")


def groups_of(x: Tensor, effects: Floats, rng: np.random.Generator) -> dict[str, list[int]]:
    """Groups by strategy and number: random, nearest to a row, and half of those with the largest effects."""
    order = np.argsort(-np.abs(effects))
    found: dict[str, list[int]] = {}
    for repeat in range(REPEATS):
        for size in np.linspace(0.005 * len(x), 0.05 * len(x), SIZES).round().astype(int):
            centre = x[int(rng.integers(len(x)))]
            rows = {
                "random": rng.choice(len(x), size, replace=False),
                "cluster": (x - centre).square().sum(1).argsort()[:size].numpy(),
                "top": rng.choice(order[: 2 * size], size, replace=False),
            }
            found |= {f"{strategy} {repeat} {size}": chosen.tolist() for strategy, chosen in rows.items()}
    return found


def logistic(seed: int, ridge: float) -> dict[str, Any]:
    """Slopes and errors of one split of the digits."""
    images, labels = shuffled_digits(seed)
    x, y, test, answers = images[:ROWS], (labels[:ROWS] % 2).double(), images[TEST], (labels[TEST] % 2).double()
    whole = fitted(x, y, torch.ones(1, ROWS).to(x), ridge, torch.zeros(1, PIXELS).to(x))
    module = nn.Linear(PIXELS, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(whole)
    context = context_of(module, bits, (x, y), {str(k): weight(k) for k in range(PIXELS)})
    plain = scored(context, IF("exact", damping=ridge)).scores

    def test_loss(change: Tensor) -> Floats:
        z = (whole + change) @ test.T
        found: Floats = (
            F.binary_cross_entropy_with_logits(z, answers.expand(len(z), -1), reduction="none").sum(1).numpy()
        )
        return found

    def retrained(left_out: list[list[int]]) -> Tensor:
        kept = torch.ones(len(left_out), ROWS).to(x)
        for mask, rows in zip(kept, left_out, strict=True):
            mask[rows] = 0.0
        return fitted(x, y, kept, ridge, whole.expand(len(kept), -1)) - whole

    slopes = (torch.sigmoid(whole @ test.T)[0] - answers) @ test
    groups = groups_of(x, plain @ slopes.numpy(), np.random.default_rng(seed))
    rescaled = scored(context, IF("exact", damping=ridge, rescale="rif", groups=groups))
    each = {"IF": plain, "RIF": rescaled.scores}
    own = {name: (change * x.numpy()).sum(1) for name, change in each.items()}
    actual = (retrained([[k] for k in range(ROWS)]) * x).sum(1).numpy()
    found: dict[str, Any] = {"single rows, own logit": {name: compared(actual, one) for name, one in own.items()}}
    for strategy in ("random", "cluster", "top"):
        chosen = {name: rows for name, rows in groups.items() if name.startswith(strategy)}
        sums = {name: np.stack([one[rows].sum(0) for rows in chosen.values()]) for name, one in each.items()}
        sums["Newton step"] = np.stack([getattr(rescaled, f"newton {name}") for name in chosen])
        changes = {name: torch.from_numpy(one) for name, one in sums.items()}
        truth = retrained(list(chosen.values()))
        logits = (truth @ test[:20].T).numpy().ravel()
        losses = test_loss(truth) - test_loss(torch.zeros(1, PIXELS).double())
        found[f"{strategy} groups, test logits"] = {
            name: compared(logits, (one @ test[:20].T).numpy().ravel()) for name, one in changes.items()
        }
        found[f"{strategy} groups, test loss"] = {
            name: compared(losses, test_loss(one) - test_loss(0 * one[:1])) for name, one in changes.items()
        }
    return found


def compared(actual: Floats, predicted: Floats) -> dict[str, float]:
    return {
        "slope": slope(actual, predicted),
        "error": relative_error(actual, predicted),
        "spearman": float(spearmanr(actual, predicted).statistic),
    }


def measured(quick: bool) -> dict[str, Any]:
    """The table's numbers for every split of the digits, by ridge."""
    splits, ridges = (2, RIDGES[:1]) if quick else (10, RIDGES)
    return {
        f"{ridge:g}": [logistic(seed, ridge) for seed in track(range(splits), description=f"ridge {ridge:g}")]
        for ridge in ridges
    }
