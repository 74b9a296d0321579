"""How close one run's scores come to the truth of retraining, over a family of protocols (benchmarks/family/).

    python -m benchmarks.fidelity_family --json family.json --truth DIR --half develop

Twenty trainings drawn once from data sets, networks, optimizers, schedules and sizes, the package's defaults in all of
them, judged by groups of 50-100 and of 10-25 rows and by single rows. The family is split in two: develop on one half,
report the other one once. ``--seed`` draws a family that nobody has seen. Retraining takes about ten minutes a half on
one core; --truth keeps it. Scores: two minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.family import measures, tasks, truth
from benchmarks.family.protocols import SEED, Protocol, draw
from benchmarks.family.recorded import record
from benchmarks.network import machine


def study(
    protocol: Protocol, runs: int, seeds: int, folder: Path | None, quick: bool = False, closing: bool = True
) -> dict[str, Any]:
    """The truth of a protocol, and what the scores of ``seeds`` runs are worth."""
    task = tasks.load(protocol)
    if quick:
        task = replace(task, groups={size: groups[:4] for size, groups in task.groups.items()})
    true = truth.load(protocol, task, runs, folder)
    reliability = {size: true.reliability(size) for size in task.groups}
    found = {
        "default": measures.judge([record(protocol, task, k, closing=closing) for k in range(seeds)], true, task),
        "first order": measures.judge([record(protocol, task, 0, discount=False)], true, task),
    }
    about = {"runs": len(true.base), "seconds": true.seconds, "sd": float(np.median(true.sd)), **reliability}
    return {"facts": protocol.facts(), "truth": about, **found}


def lines(results: dict[str, Any]) -> list[str]:
    """The table of protocols, and its median and worst."""
    names = [name.strip().split(": ") for name in measures.COLUMNS]
    head = f"{'':17s}" + "".join(f"{name[0] if len(name) > 1 else '':>9.8s}" for name in names)
    out = [head, f"{'':17s}" + "".join(f"{name[-1]:>9.8s}" for name in names)]
    for name, row in results["protocols"].items():
        values = [measures.at(row, path) for path, _ in measures.COLUMNS.values()]
        out.append(f"{name:17s}" + "".join(f"{value:9.3f}" for value in values))
    for name, row in results["summary"].items():
        out.append(f"{name:17s}" + "".join(f"{row.get(key, float('nan')):9.3f}" for key in measures.COLUMNS))
    return out


def main(argv: Sequence[str] | None = None, report: Callable[[str], None] = print) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--truth", type=Path, help="folder that keeps the truth, a file for each protocol")
    parser.add_argument("--half", choices=("develop", "report", "all"), default="develop")
    parser.add_argument("--seed", type=int, default=SEED, help="draws another family, which nobody has tuned on")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="protocols of the half, by name")
    parser.add_argument("--runs", type=int, help="trainings a group, where no file has them (64 or 32)")
    parser.add_argument("--seeds", type=int, default=3, help="recorded runs of each protocol")
    parser.add_argument("--truth-only", action="store_true", help="retrain, and show nothing but how long it took")
    parser.add_argument("--without-closing", action="store_true", help="the scores of the run alone")
    parser.add_argument("--quick", action="store_true", help="one epoch of 2 protocols, 4 trainings: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the matrices are small: more threads are slower
    halves = draw(args.seed)
    drawn = halves["develop"] + halves["report"] if args.half == "all" else halves[args.half]
    protocols = [p for p in drawn if args.only is None or p.name in args.only]
    if args.only and len(protocols) < len(set(args.only)):
        raise SystemExit(f"--only: --half {args.half} has {', '.join(p.name for p in drawn)}")
    seeds = args.seeds
    if args.quick:
        protocols, args.runs, seeds = [replace(p, epochs=1, rows=300) for p in protocols[:2]], 4, 2
    results: dict[str, Any] = {"protocol": "family", "half": args.half, "seed": args.seed, "machine": machine()}
    results |= {"seeds": seeds, "closing": not args.without_closing, "protocols": {}}
    for protocol in protocols:
        runs = args.runs or protocol.runs
        if args.truth_only:
            found = truth.load(protocol, tasks.load(protocol), runs, args.truth)
            report(f"{protocol.name}: {found.seconds:.0f} s")
            continue
        results["protocols"][protocol.name] = study(
            protocol, runs, seeds, args.truth, args.quick, not args.without_closing
        )
        results["summary"] = measures.summary(results["protocols"].values())
        args.json.write_text(json.dumps(results, indent=1))
    if not args.truth_only:
        for line in [*lines(results), "", measures.LEGEND]:
            report(line)


if __name__ == "__main__":
    main()
