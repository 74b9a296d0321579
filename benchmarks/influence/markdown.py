"""The measurements of ``benchmarks.influence`` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.influence.shared import mean_and_error
from benchmarks.markdown import number, table

HEAD = """\
## Influence functions at the trained weights

```bash
python -m benchmarks.influence --json influence.json
```

All on scikit-learn's digits. ± is a standard error; of what, each table says. A slope is that of the prediction on what
retraining did, through the origin: below 1, predictions are too small.
"""
CALIBRATION = """\
**Does leaving rows out do what the scores say?** Logistic regression of even against odd digits, 200 rows, 64 pixels,
no intercept; retrained to convergence in float64 without a row, or without one of 30 groups of .5 to 5 % of the rows:
random ones, the nearest to a row, or half of those with the largest effect on the test loss. Predicted logits and
losses are those of the predicted weights. Slope and, in brackets, the relative error; over {splits} splits of the data.
"""
RIDGE = """\
Half the squared weights times {ridge} beside the mean loss:
"""
NETWORK = """\
A network 64-8-10 on 200 rows (20 of them with a wrong label), weight decay .002, retrained to convergence (gradients
below {gradient:.0e}) without one row, for {rows} rows; exact Fisher. To first order: the change of the weights times
the gradient of the row's own loss. Over {seeds} splits.
"""
HALVES = """\
**Do scores foretell training on half of the rows?** {rows} rows, a network 64-24-10, {epochs} epochs of SGD with
momentum. LDS of {queries} margins over {subsets} random halves, {trainings} trainings each, whose two halves agree to
{agree:.2f}; ± over {models} networks, each scored alone, and in brackets the LDS of their mean score. Damping "run" is
{run:.3g}, "auto" {auto:.2g} in the mean of the layers.
"""
DIFFERENCES = """\
Differences, with 95 % intervals over resampled halves:
"""
SAMPLED = """\
**Rows that stand for all.** Unlearning class 8 with a network 64-12-10 on {rows} rows: F1 of unlearnt and kept
accuracy, relative error of the solution, and trace of the sampled Fisher over that of all rows, when the Fisher comes
from m rows; ± over {seeds} draws (of one network; topk always takes the same rows). F1 of all rows {whole:.3f}, before
{before:.3f}.
"""
PRODUCTS = """\
**How near do solvers come?** The network of the halves, {parameters:,} parameters, {queries} queries at once, damping
{damping:g}: median relative error against the exact solution; products with the Fisher of all rows, of which one with
256 rows is a part; CPU seconds. ± over {models} networks.
"""
PEERS = """\
**Beside other libraries.** EK-FAC by the rows' own labels (empirical Fisher) of one such network, damping {damping:g}:
agreement with this package's scores, and CPU seconds of a whole call (median, least to most of {calls} calls in turn,
the first left out). The network is tiny, so these are the costs of a call; kronfluence writes its factors and scores to
disk. Two faults of dattri's EK-FAC are mended here (benchmarks/lds/peers.py). pyDVL's Fisher is another one.
"""


WIDER = """The same with 1,500 rows and one wider hidden layer, median seconds of two calls (times ours):
"""


def section(results: dict[str, Any]) -> Iterable[str]:
    """The section of a file of results."""
    yield HEAD
    by_ridge = results["calibration"]
    yield CALIBRATION.format(splits=len(next(iter(by_ridge.values()))))
    for ridge, splits in by_ridge.items():
        yield RIDGE.format(ridge=ridge)
        yield logistic(splits)
    networks = results["single_rows"]
    yield NETWORK.format(
        gradient=max(one["gradient"] for one in networks), rows=networks[0]["rows"], seeds=len(networks)
    )
    yield of_network(networks)
    found = results["halves"]
    yield HALVES.format(
        agree=found["truth halves agree"],
        run=found["damping used"]["run"],
        auto=found["damping used"]["auto"],
        **{key: found[key] for key in ("rows", "epochs", "queries", "subsets", "trainings", "models")},
    )
    yield halves(found)
    yield DIFFERENCES
    yield differences(found["differences"])
    found = results["sampled"]
    yield SAMPLED.format(
        rows=found["rows"], seeds=found["seeds"], whole=found["f1 of all rows"], before=found["f1 before"]
    )
    yield sampled(found["samplers"])
    found = results["products"]
    yield PRODUCTS.format(**{key: found[key] for key in ("parameters", "queries", "damping", "models")})
    yield products(found["solvers"])
    yield PEERS.format(**{key: results["peers"][key] for key in ("damping", "calls")})
    yield peers(results["peers"])
    yield WIDER
    yield wider(results["peers"]["wider"])


def logistic(splits: Sequence[dict[str, Any]]) -> str:
    methods = ("IF", "RIF", "Newton step")
    rows = []
    for what in splits[0]:
        cells = [what]
        for method in methods:
            each = [split[what][method] for split in splits if method in split[what]]
            cells.append(_slope_and_error(each) if each else "")
        rows.append(cells)
    return table(["", *methods], rows)


def of_network(networks: Sequence[dict[str, Any]]) -> str:
    rows = []
    for what in ("own loss to first order", "own loss"):
        for method in ("IF", "RIF"):
            each = [one[what][method] for one in networks]
            ratio, rank = (_mean([one[key] for one in each]) for key in ("median ratio", "spearman"))
            rows.append([f"{method}, {what}", ratio, _slope_and_error(each), rank])
    return table(["", "median predicted / actual", "slope (relative error)", "Spearman"], rows)


def halves(found: dict[str, Any]) -> str:
    dampings = list(found["lds"]["ekfac"])
    rows = []
    for solver, by_damping in found["lds"].items():
        together = found["mean of models"][solver]
        rows.append(
            [
                solver,
                *(f"{_with(by_damping[d])} ({together[d]:.3f})" if d in by_damping else "" for d in ["", *dampings]),
            ]
        )
    return table(["", "no damping", *(f"damping {d}" for d in dampings)], rows)


def differences(found: dict[str, Any]) -> str:
    dampings = list(next(iter(found.values())))
    rows = [
        [name, *(f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})" for one in by_damping.values())]
        for name, by_damping in found.items()
    ]
    return table(["", *(f"damping {d}" for d in dampings)], rows)


def sampled(found: dict[str, Any]) -> str:
    rows = [
        [f"{name}, m = {size}", *(_with(row[key]) for key in ("F1", "error", "trace"))]
        for name, by_size in found.items()
        for size, row in by_size.items()
    ]
    return table(["", "F1", "relative error", "trace"], rows)


def products(found: dict[str, Any]) -> str:
    rows = []
    for solver, by_steps in found.items():
        for steps, row in by_steps.items():
            error, spread = row["error"]
            shown = f"{error:.1e}" + ("" if spread is None else f" ± {spread:.0e}")
            taken = f"{row['products'][0]:.1f}" if int(steps) else ""  # of closed forms it is the check's
            name = f"{solver}, {steps} steps" if taken else solver
            rows.append([name, shown, taken, _with(row["seconds"])])
    return table(["", "relative error", "products", "seconds"], rows)


def peers(found: dict[str, Any]) -> str:
    rows = []
    for name, row in found["libraries"].items():
        rows.append([name, f"{row['spearman']:.6f}", f"{row['scale']:.6g}", f"{row['error']:.1e}"])
        rows[-1] += [f"{a:.3f} ({b:.3f} to {c:.3f})" for a, b, c in (row["seconds"], row["times ours"])]
    rows += [[f"{name}: not installed", *[""] * 5] for name in found["missing"]]
    return table(["", "Spearman", "scale", "relative error at that scale", "seconds", "times ours"], rows)


def wider(found: dict[str, Any]) -> str:
    libraries = list(next(iter(found.values())))
    rows = []
    for name in libraries:
        each = [by_library[name][0] for by_library in found.values()]
        ours = [by_library["ine_callback"][0] for by_library in found.values()]
        rows.append([name, *(f"{a:.2f} ({a / b:.1f})" for a, b in zip(each, ours, strict=True))])
    return table(["", *(f"{width} wide" for width in found)], rows)


def _slope_and_error(each: Sequence[dict[str, float]]) -> str:
    return f"{_mean([one['slope'] for one in each])} ({number(mean_and_error([one['error'] for one in each])[0])})"


def _mean(values: Sequence[float]) -> str:
    return _with(mean_and_error(values))


def _with(found: Sequence[float | None]) -> str:
    mean, error = found
    return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")
