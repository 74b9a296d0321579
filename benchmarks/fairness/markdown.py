"""Fair subspaces as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.markdown import number, table
from benchmarks.metrics import mean_and_half_width

HEAD = """\
## Fair subspaces and the gap query

```bash
python -m benchmarks.fairness --json fairness.json
```

Means over {seeds} seeds, ± half of a 95 % interval. The definition of the subspaces is ours, after the abstract of
arXiv 2510.23935, so no number of the paper is at hand to compare with.
"""

PLANTED = """\
Digits, 1,200 training rows, with brightness as a group that correlates .7 with "the digit is 5 or more"; an MLP
64-32-C. Held out: 597 rows of the same kind, and the same digits with groups drawn anew. Gaps are those of decisions.
No decisions of so small a gap can be right more often than "at most": the groups differ in their labels.
"""


def section(results: dict[str, Any]) -> Iterable[str]:
    """The section of ``benchmarks.fairness``."""
    yield HEAD.format(seeds=results["seeds"])
    found = results["recovery"]
    yield table(
        [
            f"angle to the true space in degrees, {found['runs']} runs",
            *(f"{n:,} rows" for n in found["sizes"]),
            "slope",
        ],
        ([k, *map(number, each), f"{found['slopes'][k]:.2f}"] for k, each in found["angles"].items()),
    )
    lines = [[f"full removal less LEACE: {name}", f"{max(each):.0e}"] for name, each in results["leace"].items()]
    known = results["trade-off"]
    lines += [
        [f"trade-off of Gaussian features, {known['rows']:,} rows: {name}", f"{max(known[name]):.4f}"]
        for name in ("risk", "gap")
    ]
    lines += [[f"shared directions, attribute {k}", f"{v:.1%} of runs"] for k, v in results["chance"].items()]
    yield table(["greatest error, or share", ""], lines)
    yield table(
        ["influence values against leaving every row out", "least", "greatest"],
        ([k, _exact(min(each)), _exact(max(each))] for k, each in results["left out"].items()),
    )
    yield PLANTED
    for name, each in results["planted"].items():
        yield from _planted(name, each)
    yield from _gap(results["gap"])


def _exact(value: float) -> str:
    return f"{value:.0e}" if abs(value) < 1e-6 else f"{value:.4f}"


def _planted(name: str, each: Sequence[dict[str, Any]]) -> Iterable[str]:
    target, features = name.split(", ")
    what = "5 or more" if target == "high" else "ten digits"
    keeps = list(each[0]["path"])
    ends = [one["path"] for one in each]
    shown = {"the network": [one["network"] for one in each]}
    if all(list(one["path"]) == keeps for one in each):
        shown |= {f"keep {keep}": [path[keep] for path in ends] for keep in keeps}
    else:
        shown |= {"keep 0": [path["0"] for path in ends], "keep all": [list(path.values())[-1] for path in ends]}
    if each[0]["own head"]:
        shown["keep 0, the network's own head"] = [one["own head"] for one in each]
    columns = [("same", key) for key in ("accuracy", "most", "gap", "odds")]
    columns += [("shuffled", key) for key in ("accuracy", "gap", "odds")]
    words = {"accuracy": "accuracy", "most": "at most", "gap": "parity gap", "odds": "odds gap"}
    head = [f"{what}, {features}"] + [f"{words[key]}{', new groups' if k == 'shuffled' else ''}" for k, key in columns]
    yield table(head, ([k, *(_mean([one[a][b] for one in v]) for a, b in columns)] for k, v in shown.items()))
    probes = {f"{probe} probe": [list(one["probes"].values()) for one in each] for probe in ("linear", "MLP")}
    yield table(
        ["AUC of the group, held out", "keep 0", "keep all"],
        ([k, *(_mean([one[i][k.split()[0]] for one in v]) for i in (0, -1))] for k, v in probes.items()),
    )


def _mean(values: Sequence[float]) -> str:
    mean, half = mean_and_half_width(values)
    return f"{mean:.3f} ± {half:.3f}"


def _gap(found: dict[str, Any]) -> Iterable[str]:
    yield (
        f"The gap of the predicted probability on held-out rows against retraining without {found['groups']} groups of "
        f"rows, {found['runs']} times each (two halves of these rank the groups alike to {found['halves']:.2f}):\n"
    )
    scores = {name: each for name, each in found.items() if isinstance(each, dict)}
    yield table(
        ["sum of scores over the group", "Spearman, one run", "Spearman, mean of runs", "slope of the truth"],
        (
            [k, _mean(v["each_seed"]), number(v["mean of runs"]), number(v["slope"]) if "μ" in k else ""]
            for k, v in scores.items()
        ),
    )
