"""Effects measured.

    python -m benchmarks.effects --json effects.json

The protocol of arXiv 2506.09871: the WCDE in the paper's two graphs, by all valid adjustment sets; coefficients
±U(.5, 1.5), noise of standard deviation .25 as published and 1, parents added up as they are (linear nuisances) or by
their sines (splines). Then coverage of all estimands in a linear model with one mediator, paths under tiers in one of
eight nodes, edge probabilities against how often the edge is there, networks as nuisances, and the ATE beside
doubleml's and dowhy's where these are installed. The splines' scaling and the limit of imbalance were
settled after looking at runs of this file, so its rows with sines are no independent judge of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.effects import natural, networks, posteriors, tiers
from benchmarks.effects.graphs import GRAPHS, variances
from benchmarks.effects.markdown import section
from benchmarks.network import machine

CASES = [("sum", "linear", 1.0, 500), ("sum", "linear", 1.0, 1000), ("sum", "linear", 1.0, 2000)]
CASES += [("sum", "linear", 0.25, 1000), ("sin", "spline", 1.0, 1000)]
ROWS = 1000  # of the linear model


PARTS = ("coverage", "doubleml", "dowhy", "paths", "posteriors", "networks", "graphs")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go; what is there is kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts; by default all")
    parser.add_argument(
        "--repetitions", type=int, default=100, help="for each set of coefficients; of sin half as many"
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions, to see that it works")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sets, repetitions = (1, 2) if args.quick else (5, args.repetitions)
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    results |= {"protocol": "effects", "machine": machine(), "sets": sets, "repetitions": repetitions}
    for part in PARTS:
        if part in args.only:
            for found in _part(part, sets, repetitions, args.quick):
                results |= found | {"graphs": results.get("graphs", {}) | found.get("graphs", {})}
                args.json.write_text(json.dumps(results, indent=1) + "\n")  # long: what is done is kept
    print("\n".join(section(results)))


def _part(part: str, sets: int, repetitions: int, quick: bool) -> Iterator[dict[str, Any]]:
    runs = 2 if quick else 100
    if part == "coverage":
        yield {
            "coverage": natural.coverage(ROWS, sets * repetitions),
            "coverage runs": sets * repetitions,
            "rows": ROWS,
        }
    elif part == "doubleml":
        yield {"doubleml": natural.beside_doubleml(ROWS, 1 if quick else 20)}
    elif part == "dowhy":
        yield {"dowhy": natural.beside_dowhy(ROWS, 1 if quick else 20)}
    elif part == "paths":
        yield {"paths": {kind: tiers.measured(kind, 2000, runs) for kind in tiers.KINDS}, "paths runs": runs}
    elif part == "posteriors":
        few = 1 if quick else 30
        calibrated = {curve: posteriors.calibration(curve, ROWS, few) for curve in posteriors.CURVES}
        yield {
            "calibration": calibrated,
            "calibration runs": few,
            "flow paths": posteriors.flow_paths(ROWS, 1 if quick else 10),
        }
    elif part == "networks":
        few = 1 if quick else 50
        yield {"networks": networks.measured(ROWS if not quick else 300, few), "networks runs": few}
    else:
        for function, models, noise, rows in CASES[:1] if quick else CASES:
            for name in GRAPHS:
                count = repetitions // 2 if function == "sin" else repetitions
                found = variances(name, function, models, noise, rows, sets, count, seed=0)
                yield {"graphs": {f"{name}, {function}, noise {noise:g}, {rows} rows": found}}


if __name__ == "__main__":
    main()
