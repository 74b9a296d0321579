"""Influence functions: calibration against retraining, LDS, samplers, solvers, and other libraries.

python -m benchmarks.influence --json influence.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.influence import calibration, halves, peers, products, sampled, single_rows
from benchmarks.influence.markdown import section
from benchmarks.network import machine

TABLES: dict[str, Callable[[bool], Any]] = {
    "calibration": calibration.measured,
    "single_rows": single_rows.measured,
    "halves": halves.measured,
    "sampled": sampled.measured,
    "products": products.measured,
    "peers": peers.measured,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, help="these tables anew, the others as they are in the file"
    )
    parser.add_argument("--quick", action="store_true", help="few rows, halves, draws and steps: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"protocol": "influence", "machine": machine()}
    if args.only:
        results = json.loads(args.json.read_text())
    for name in args.only or TABLES:
        results[name] = TABLES[name](args.quick)
        args.json.write_text(json.dumps(results, indent=1))
    print("\n".join(section(results)))


if __name__ == "__main__":
    main()
