"""The measurements of ``benchmarks.layers`` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.stats import sem, spearmanr

from benchmarks.markdown import table

HEAD = """\
## Pruning by the sensitivity of blocks

```bash
python -m benchmarks.layers --json layers.json
```

Scikit-learn's digits, 900 rows, {epochs} epochs of AdamW, a pre-norm residual network of 8 blocks of width 48, {seeds}
trainings. LayerIF's plans from the scores of 300 rows on 50 held-out ones; the smallest weights of each block go. Test
accuracy (697 rows; {dense} before pruning) by the fraction of weights pruned, ± its standard error over the trainings.
The differences are of the same trainings.
"""
PLACES = """\
S of the blocks, from the input to the output, relative to the largest, mean over the trainings: {values}.
Its rank correlation with depth: {depth} (mean and standard deviation over the trainings). Correlation of that with
what LayerIF's plan gains over the uniform one: {gains}; near 1 the plan gains
where it is like the ramp.
"""


def layers(results: dict[str, Any]) -> Iterable[str]:
    """The section of a file of results."""
    yield HEAD.format(epochs=results["epochs"], seeds=results["seeds"], dense=_mean(results["dense"]))
    yield shown(results)
    yield places(results)


def places(results: dict[str, Any]) -> str:
    """How S goes with depth, and what that has to do with the accuracy."""
    depth = [spearmanr(values, range(len(values))).statistic for values in results["sensitivity"]]
    gains = {
        budget: np.corrcoef(np.subtract(arms["LayerIF"], arms["uniform"]), depth)[0, 1]
        for budget, arms in results["accuracy"].items()
    }
    return PLACES.format(
        values=", ".join(f"{value:.2f}" for value in np.mean(results["sensitivity"], axis=0)),
        depth=f"{np.mean(depth):.2f}, {np.std(depth, ddof=1):.2f}",
        gains=", ".join(f"{value:.2f} at {100 * float(budget):.0f} %" for budget, value in gains.items()),
    )


def shown(results: dict[str, Any]) -> str:
    """The table alone."""
    found = results["accuracy"]
    plans = list(next(iter(found.values())))
    lines = [[plan, *(_mean(arms[plan]) for arms in found.values())] for plan in plans]
    for other in (plan for plan in plans if plan != "LayerIF"):
        gains = (np.subtract(arms["LayerIF"], arms[other]).tolist() for arms in found.values())
        lines.append([f"LayerIF less {other}", *map(_mean, gains)])
    return table(["", *(f"{100 * float(budget):.0f} %" for budget in found)], lines)


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {sem(values):.3f}"
