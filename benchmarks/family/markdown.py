"""The family's results as a section of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.family.measures import COLUMNS, LEGEND, at
from benchmarks.markdown import number, table

HEAD = """\
## A family of protocols, half "{half}"

```bash
python -m benchmarks.fidelity --family --json family.json --truth DIR --half {half} --seeds {seeds}
```

{count} trainings drawn once from data sets, networks, optimizers, schedules and sizes, and the package's defaults in
all of them: {seeds} runs against retraining without groups of rows. The family was split in two before any result.
"""


def section(results: dict[str, Any]) -> Iterable[str]:
    """The protocols with their median and worst, and what each is."""
    protocols = results["protocols"]
    yield HEAD.format(half=results["half"], seeds=results["seeds"], count=len(protocols))
    rows = {name: {key: at(row, path) for key, (path, _) in COLUMNS.items()} for name, row in protocols.items()}
    rows |= results["summary"]
    body = ([name, *(number(row.get(key)) for key in COLUMNS)] for name, row in rows.items())
    yield table(["", *(key.strip() for key in COLUMNS)], body)
    yield LEGEND
    about = ([name, f"{row['truth']['seconds']:.0f}", row["facts"]] for name, row in protocols.items())
    yield table(["", "seconds of retraining", "training"], about)
