"""Fair subspaces and the gap query, measured.

    python -m benchmarks.fairness --json fairness.json

Against closed forms: spaces recovered, the trade-off of Gaussian features, LEACE, rows left out, the bootstrap. Then
digits with a planted group (brightness, correlated .7 with "the digit is 5 or more"): the path on held-out rows of the
same kind, and on the same digits with groups drawn anew; what a linear and an MLP probe still read. And f-INE's gap
query against retraining without 40 groups of rows. Nothing is tuned.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.fairness import gap_query, oracles, planted
from benchmarks.fairness.markdown import section
from benchmarks.network import machine


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two seeds and few rows, to see that it works")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    seeds, quick = (2, True) if args.quick else (args.seeds, False)
    results: dict[str, Any] = {"protocol": "fairness", "machine": machine(), "seeds": seeds}
    results |= known(seeds, quick)
    results["planted"] = on_digits(seeds, quick)
    results["gap"] = gap_query.compared(seeds, 16 if quick else 256)
    args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(section(results)))


def known(seeds: int, quick: bool) -> dict[str, Any]:
    """What is known exactly."""
    sizes = (500, 2000) if quick else (500, 2000, 8000, 32000)
    found = [oracles.recovery(seed, sizes) for seed in track(range(2 * seeds), description="recovery")]
    angles = {name: np.mean([each[name] for each in found], 0).tolist() for name in found[0]}
    slopes = {name: float(np.polyfit(np.log(sizes), np.log(each), 1)[0]) for name, each in angles.items()}
    rows = 20_000 if quick else 400_000
    return {
        "recovery": {"sizes": sizes, "angles": angles, "slopes": slopes, "runs": 2 * seeds},
        "leace": _all(oracles.leace(seed) for seed in range(seeds)),
        "trade-off": _all(oracles.trade_off(seed, rows) for seed in range(seeds)) | {"rows": rows},
        "left out": _all(
            oracles.rows_left_out(seed, 100 if quick else 400, 50 if quick else 400)
            for seed in track(range(seeds), description="rows left out")
        ),
        "chance": oracles.chance(10 if quick else 200),
    }


def on_digits(seeds: int, quick: bool) -> dict[str, Any]:
    """Every seed's path for each target and each kind of features."""
    kinds = [("high", "penultimate"), ("high", "input"), ("digit", "penultimate"), ("digit", "input")]
    return {
        f"{target}, {features}": [
            planted.measured(target, features, seed)
            for seed in track(range(seeds), description=f"{target}, {features}")
        ]
        for target, features in (kinds[:1] if quick else kinds)
    }


def _all(found: Any) -> dict[str, list[float]]:
    each = list(found)
    return {name: [one[name] for one in each] for name in each[0]}


if __name__ == "__main__":
    main()
