"""What a gradient store of few bytes a row still tells, and how fast it is asked.

    python -m benchmarks.store --json store.json --data DIR --truth FOLDER

accuracy  G1 (SGD, AdamW), on which the compression was chosen first; G2 and fine-tuning (FT), on which nothing was.
          Each is trained once with a store; its queries, asked again of the store at several sizes, are compared with
          their scores in the run and with retraining. What the first store had, which failed on the last two and was
          mended on other trainings (family), stays in the file as "first"
wide      G2 and fine-tuning again, with a store of up to 4 KB
family    trainings like those of the family, on which the store was mended: Spearman with the run alone
peers     other stores of gradients on G2 at 1 KB a row of each network: traker, dattri, bergson where they are there
bits      components drawn at random, with spectra from flat to steep: what scores lose in int8 and in mixed widths
speed     stores of 10^6 rows, filled at random, and 100 queries, with two threads
cost      what the store adds to a training step (GPT-2 small needs transformers)
many      481 queries in the run: memory and time of their directions
weak      weak groups of scikit-learn's digits against trainings without them

Trainings that are killed and resumed are benchmarks.resume's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import folder
from benchmarks.network import machine
from benchmarks.overhead.workloads import missing
from benchmarks.store import accuracy, bits, cost, family, many, peers, speed, weak
from benchmarks.store.protocols import NAMES, g2, record
from ine_callback import GradientStore

PARTS = ("accuracy", "wide", "family", "bits", "peers", "speed", "cost", "many", "weak")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go; parts already there stay")
    parser.add_argument("--data", help="folder with mnist10k.npz and tinyshakespeare.txt (or INE_DATA)")
    parser.add_argument("--truth", type=Path, help="folder that keeps truths; by default that of --json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--protocols", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--workloads", nargs="+", choices=cost.ROUNDS, default=[*cost.ROUNDS], help="whose steps")
    parser.add_argument("--peers", default="", help="part of the names of the other stores wanted")
    parser.add_argument("--unjudged", action="store_true", help="the run's scores alone: no retraining")
    parser.add_argument("--quick", action="store_true", help="small problems: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data, truth, quick = folder(args.data), args.truth or args.json.parent, args.quick
    truth.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    results |= {"protocol": "store", "machine": machine(), "data": "digits" if data is None else "MNIST"}

    def keep(part: str, found: dict[str, Any]) -> None:
        results.setdefault(part, {}).update(found)
        args.json.write_text(json.dumps(results, indent=1))
        print(part, json.dumps(found, indent=1), flush=True)

    for name in args.protocols:
        if "accuracy" in args.parts:
            found = record(name, GradientStore(), data, truth, quick, not args.unjudged)
            keep("accuracy", {name: accuracy.curve(found)})
        if "wide" in args.parts and name not in ("g1-sgd", "g1-adamw"):  # G1's network has no more entries
            keep("wide", {name: accuracy.curve(record(name, GradientStore(4096), data, truth, quick))})
    if "family" in args.parts:
        for name, row in family.all_of(quick):
            keep("family", {name: row})
    if "bits" in args.parts:
        keep("bits", bits.all_of(quick))
    if "speed" in args.parts:
        for name, bands in speed.STORES.items():
            keep("speed", {name: speed.asked(10**4 if quick else 10**6, 100, bands)})
    if "peers" in args.parts:
        problem, outcome = g2(data, truth, quick)
        for row in peers.beside(problem, outcome, None if quick else truth / "g2-networks.pt", args.peers):
            keep("peers", {row["name"]: row})
    if "cost" in args.parts:
        for name in ["mlp"] if quick else args.workloads:
            if lacks := missing(name):
                print(f"{name} is left out: {lacks} is not installed")
                continue
            keep("cost", {name: cost.of_step(name, data, quick)})
            if name == "mlp":
                keep("cost", {f"{name}, few": cost.of_step(name, data, quick, cost.FEW)})
    if "many" in args.parts:
        keep("many", many.all_of(quick))
    if "weak" in args.parts:
        keep("weak", weak.all_of(quick))


if __name__ == "__main__":
    main()
