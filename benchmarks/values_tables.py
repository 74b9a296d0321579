"""Values of training rows as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import number, table

VALUES_HEAD = """\
## Values against clean rows: KAIROS

```bash
python -m benchmarks.values --json values.json
```

Digits, 1,200 training rows and 300 clean ones; a tenth has a wrong label, or pixels with noise of standard deviation
.35; or 30 rows are poisoned. AUROC ± standard error over {seeds} seeds; mean loss and self-influence are of the same
runs.
"""


AIRREP_HEAD = """\
## Values learned from retraining: AirRep

```bash
python -m benchmarks.values_airrep --json values-airrep.json
```

Digits, 1,000 training rows; an MLP is trained anew on {subsets} subsets of 60 rows. A quarter of the subsets, and of
the {dev} dev rows, judges each score: LDS, mean ± half a 95 % interval over {seeds} seeds. Gradients and the Fisher are
those of one training on all rows. Collecting and fitting took {seconds:.1f} CPU seconds, the median.
"""
PRICE_HEAD = """\
A training row of 128 tokens for one query, in one thread: counted operations (matrix products and attention) and CPU
time. The gradient is that of a transformer of 12 layers of width 256, the small encoder has one layer of width 64, the
default encoder takes the large one's features; `benchmarks/airrep_price.py` says exactly what is counted.
"""


def values(results: dict[str, Any]) -> Iterable[str]:
    """The section of ``benchmarks.values``."""
    yield VALUES_HEAD.format(seeds=results["seeds"])
    found = dict(results["kairos"])
    taken = found.pop("seconds")
    names = next(iter(found.values()))
    yield table(
        ["score", *found],
        ([name, *(f"{each[name]['auroc']:.3f} ± {each[name]['se']:.3f}" for each in found.values())] for name in names),
    )
    head = f"CPU seconds of one thread, {taken.pop('rows'):,} x {taken.pop('reference'):,} rows"
    yield table([head, ""], ([name, number(value)] for name, value in taken.items()))


def airrep(results: dict[str, Any]) -> Iterable[str]:
    """The section of ``benchmarks.values_airrep``."""
    yield AIRREP_HEAD.format(**{key: results[key] for key in ("subsets", "dev", "seeds", "seconds")})
    yield table(
        ["score", "LDS"], ([n, f"{s['mean']:.3f} ± {s['half_width']:.3f}"] for n, s in results["scores"].items())
    )
    rows = []
    for name, gate in results["gates"].items():
        half = "" if gate["half_width"] is None else f" ± {gate['half_width']:.3f}"
        rows.append([name, number(gate["mean"]) + half, f"{gate['least']:g}", "kept" if gate["kept"] else "missed"])
    yield table(["promised", "found", "at least", ""], rows)
    yield PRICE_HEAD
    price = results["price"]
    dearest = max(each["seconds"] for each in price.values())
    yield table(
        ["a score by", "MFLOP", "ms", "times cheaper"],
        (
            [name, f"{1e3 * p['gflop']:.3g}", f"{1e3 * p['seconds']:.3g}", f"{dearest / p['seconds']:,.0f}"]
            for name, p in price.items()
        ),
    )
