"""Effects as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import number, table

HEAD = """\
## Effects

```bash
python -m benchmarks.effects --json effects.json
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
    titled = {
        "coverage": f"linear model with a mediator, 1,000 rows, {results.get('coverage runs')} runs",
        "paths": f"paths under tiers, 8 nodes, 2,000 rows, {results.get('paths runs')} runs",
        "networks": f"ATE where lines are wrong, 1,000 rows, {results.get('networks runs')} runs",
    }
    for part, title in titled.items():
        if found := results.get(part):
            columns = list(next(iter(found.values())))
            yield table([title, *columns], ([key, *(number(each[c]) for c in columns)] for key, each in found.items()))
    for curve, each in results.get("calibration", {}).items():
        columns = list(next(iter(each.values())))
        head = [f"edges that act by a curve: {curve}, 1,000 rows, {results['calibration runs']} runs", *columns]
        yield table(head, ([key, *(number(one[c]) for c in columns)] for key, one in each.items()))
    if found := results.get("flow paths"):
        yield table(["F1 of paths by a flow, 1,000 rows", ""], ([k, number(v)] for k, v in found.items()))
    for name in ("doubleml", "dowhy"):
        if found := results.get(name):
            yield table([f"ATE beside {name}", ""], ([k, number(v)] for k, v in found.items()))


def _short(value: float | None) -> str:
    return number(value) if value is None or abs(value) >= 0.1 else f"{value:.4f}"
