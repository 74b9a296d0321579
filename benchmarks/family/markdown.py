"""The family's results as a section of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.family.measures import COLUMNS, LEGEND, at
from benchmarks.family.protocols import SEED
from benchmarks.markdown import number, table

HEAD = """\
## A family of protocols, {which}

```bash
python -m benchmarks.fidelity --family --json family.json --truth DIR --half {half} --seeds {seeds}{option}
```

{count} trainings drawn once from data sets, networks, optimizers, schedules and sizes, and the package's defaults in
all of them: {seeds} runs against retraining without groups of rows. {said}
"""


def section(results: dict[str, Any]) -> Iterable[str]:
    """The protocols with their median and worst, and what each is."""
    protocols = results["protocols"]
    own = results["seed"] != SEED
    which = f'seed {results["seed"]}, part "{results["half"]}"' if own else f'half "{results["half"]}"'
    option = f" --seed {results['seed']}" if own else ""
    if not results["closing"]:
        which, option = f"{which}, the run alone", f"{option} --without-closing"
    said = "Another family than the one developed on." if own else "Split in two before any result."
    values = {key: results[key] for key in ("half", "seeds")}
    yield HEAD.format(**values, which=which, option=option, said=said, count=len(protocols))
    rows = {name: {key: at(row, path) for key, (path, _) in COLUMNS.items()} for name, row in protocols.items()}
    rows |= results["summary"]
    body = ([name, *(number(row.get(key)) for key in COLUMNS)] for name, row in rows.items())
    yield table(["", *(key.strip() for key in COLUMNS)], body)
    yield LEGEND
    about = ([name, f"{row['truth']['seconds']:.0f}", row["facts"]] for name, row in protocols.items())
    yield table(["", "seconds of retraining", "training"], about)
