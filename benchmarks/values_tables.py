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
