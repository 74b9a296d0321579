"""Effects as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import number, table

HEAD = """\
## Effects

```bash
python -m benchmarks.effects --json effects.json --repetitions {repetitions}
```

WCDE in the two graphs of arXiv 2506.09871, all valid sets, {sets} sets of coefficients with {repetitions} repetitions
each (of sin half). Numbers are means over the sets of coefficients. The paper has noise of standard deviation .25,
with which hardly any row has the mediators of the other treatment; 1 is ours. "Refused" is the share of estimates that
`estimate` would not give, for positivity. {{G1, G2}} is optimal.
"""


def section(results: dict[str, Any]) -> Iterable[str]:
    """The section of ``benchmarks.effects``."""
    yield HEAD.format(**{key: results[key] for key in ("sets", "repetitions")})
    for name, found in results["graphs"].items():
        columns = list(next(iter(found.values())))
        optimal = found["{G1, G2}"]["variance"]
        second = min(each["variance"] for key, each in found.items() if key != "{G1, G2}")
        head = [f"{name} (ratio to the next {optimal / second:.2f})", *columns]
        yield table(head, ([key, *(_short(each[c]) for c in columns)] for key, each in found.items()))
    columns = list(next(iter(results["coverage"].values())))
    rows = ([key, *(number(each[c]) for c in columns)] for key, each in results["coverage"].items())
    yield table(
        [f"linear model with a mediator, {results['rows']:,} rows, {results['coverage runs']} runs", *columns], rows
    )
    columns = list(next(iter(results["paths"].values())))
    rows = ([key, *(number(each[c]) for c in columns)] for key, each in results["paths"].items())
    yield table([f"paths under tiers, 8 nodes, 2,000 rows, {results['paths runs']} runs", *columns], rows)
    if results["doubleml"]:
        yield table(["ATE beside doubleml, same models", ""], ([k, number(v)] for k, v in results["doubleml"].items()))


def _short(value: float | None) -> str:
    return number(value) if value is None or abs(value) >= 0.1 else f"{value:.4f}"
