"""The measurements of ``benchmarks.label_errors`` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.markdown import table
from ine_callback.applications.label_errors import DOUBT

HEAD = """\
## Label errors

```bash
python -m benchmarks.label_errors --json label_errors.json --data DIR
```

`report.label_errors({q:g})`, one recorded run each. Recall / precision in per cent, means over seeds, by the labels
that are replaced; "–": nothing is listed. Data and networks marked * were held out: they were run after the rule was
fixed on the others. "unlike": rows that self-influence's test lists on clean data.
"""
RATES = """\
The true false-discovery rate, by the rate that is asked for, over the runs with replaced labels that list at least ten
rows: mean, and the worst run. "with note": runs whose list says that the network's own errors may be counted.
"""
PEOPLE = """\
Labels that people got wrong (all held out): AUROC of the rankings, mean over {seeds}; in brackets what
`label_errors({q:g})` lists, in per cent of the rows, and how much of it is wrong.
"""
COLUMNS = (("random", 0.02), ("random", 0.1), ("random", 0.2), ("random", 0.4), ("pair", 0.1), ("pair", 0.2))
RANKS = ("suspicion", "mean loss", "final loss", "self")
Runs = list[dict[str, Any]]


def label_errors(results: dict[str, Any]) -> Iterable[str]:
    """The sections of one file of results."""
    runs, q = results["runs"], results["q"]
    replaced = [run for run in runs if run["noise"] not in ("people", "all random")]
    people = [run for run in runs if run["noise"] == "people"]
    yield HEAD.format(q=q)
    yield table(
        [
            "data, network, epochs",
            "clean: listed",
            "unlike",
            *(f"{noise} {100 * share:.0f} %" for noise, share in COLUMNS),
        ],
        [_line(part) for part in _parts(replaced)],
    )
    if others := [run for run in replaced if "confident learning" in run]:
        yield "Confident learning on the same runs:\n"
        heads = [
            "data, network, epochs",
            "clean: listed",
            *(f"{noise} {100 * share:.0f} %" for noise, share in COLUMNS),
        ]
        yield table(heads, [_line(part, "confident learning") for part in _parts(others)])
    yield RATES
    yield table(
        ["data, network", f"q = {q:g}", f"q = {q / 2:g}", "runs", f"with note, q = {q:g}", "runs"], _rates(replaced)
    )
    if people:
        seeds = "the seeds" if len({run["seed"] for run in people}) > 1 else "one seed"
        yield PEOPLE.format(q=q, seeds=seeds)
        yield table(["data, network", *RANKS, "CL", "listed"], [_ranks(part) for part in _parts(people)])
    if noise := [run for run in runs if run["noise"] == "all random"]:
        listed = ", ".join(f"{run['network']} {run['epochs']}: {100 * run['list']['listed']:.1f} %" for run in noise)
        yield f"1,000 digits whose labels are all random (network, epochs: rows listed): {listed}.\n"


def _parts(runs: Runs) -> list[Runs]:
    """The runs of each data set, network and number of epochs."""
    keys = list(dict.fromkeys((run["data"], run["network"], run["epochs"]) for run in runs))
    return [[run for run in runs if (run["data"], run["network"], run["epochs"]) == key] for key in keys]


def _name(run: dict[str, Any], epochs: bool = True) -> str:
    length = f", {run['epochs']}" if epochs else ""
    return f"{run['data']}, {run['network']}{length}{' *' if run['held_out'] else ''}"


def _list(run: dict[str, Any], who: str) -> dict[str, float]:
    found: dict[str, float] = run["list"] if who == "list" else run[who]["list"]
    return found


def _line(part: Runs, who: str = "list") -> list[str]:
    clean = [run for run in part if run["noise"] == "clean"]
    cells = [f"{100 * np.mean([_list(run, who)['listed'] for run in clean]):.2f} %" if clean else ""]
    if who == "list":
        cells.append(f"{100 * np.mean([run['unlike']['listed'] for run in clean]):.1f} %" if clean else "")
    for noise, share in COLUMNS:
        of = [_list(run, who) for run in part if (run["noise"], run["share"]) == (noise, share)]
        cells.append(f"{_mean(of, 'recall')} / {_mean(of, 'precision')}" if of else "")
    return [_name(part[0]), *cells]


def _mean(of: Sequence[dict[str, float]], name: str) -> str:
    known = [each[name] for each in of if each[name] == each[name]]
    return f"{100 * np.mean(known):.0f}" if known else "–"


def _rates(runs: Runs) -> Iterable[list[str]]:
    keys = dict.fromkeys((run["data"], run["network"]) for run in runs)
    for data, network in keys:
        part = [run for run in runs if (run["data"], run["network"]) == (data, network) and run["noise"] != "clean"]
        sure = [run for run in part if not run["list"]["noise"] > DOUBT]
        doubtful = [run for run in part if run["list"]["noise"] > DOUBT]
        cells = [_rate(sure, "list"), _rate(sure, "strict"), str(len(_long(sure, "list")))]
        yield [_name(part[0], epochs=False), *cells, _rate(doubtful, "list"), str(len(_long(doubtful, "list")))]


def _long(runs: Runs, which: str) -> list[float]:
    """True false-discovery rates of the lists of at least ten rows."""
    return [1 - run[which]["precision"] for run in runs if run[which]["listed"] * run["rows"] >= 10]


def _rate(runs: Runs, which: str) -> str:
    found = _long(runs, which)
    return f"{np.mean(found):.2f}, {np.max(found):.2f}" if found else "–"


def _ranks(part: Runs) -> list[str]:
    cells = [f"{np.mean([run['auroc'][name] for run in part]):.3f}" for name in RANKS]
    other = [run["confident learning"]["auroc"] for run in part if "confident learning" in run]
    listed, right = (np.nanmean([run["list"][name] for run in part]) for name in ("listed", "precision"))
    return [
        _name(part[0], epochs=False),
        *cells,
        f"{np.mean(other):.3f}" if other else "",
        f"{100 * listed:.2f} % ({100 * right:.0f} %)",
    ]
