"""Runs the regimes and prints what the checks found: ``python -m tests.regimes --table``."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch

from .catalogue import ALL
from .harness import examine, shortcomings
from .refused import REFUSED, SPLIT
from .regime import Regime

BEGIN, END = "<!-- regimes: begin -->", "<!-- regimes: end -->"
HEAD = "| Regime | scores: error (tolerance) | training | counts |\n| --- | --- | --- | --- |"


def line(regime: Regime) -> tuple[str, bool]:
    """One regime's row of the table, and whether it passed."""
    if lacks := regime.lacks():
        return f"| {regime.name} | not run: {lacks} | | |", True
    try:
        verdict = examine(regime)
    except Exception as error:
        return f"| {regime.name} | **{type(error).__name__}: {error}** | | |", False
    faults = shortcomings(regime, verdict)
    error = max(verdict.error.values())
    size = f"{error:.0e} ({regime.tolerance:.0e})"
    scores = size if error <= regime.tolerance else f"**{size}**"
    left_out = verdict.report.run.uncaptured
    scores += f", {1 - verdict.report.run.captured_share:.0%} of the parameters named as left out" if left_out else ""
    scores += ", rows named as approximate" if verdict.report.run.approximate else ""
    training = "identical" if not verdict.changed else f"**changed: {', '.join(verdict.changed)}**"
    visits = int(verdict.report.observations.sum())
    counts = f"all {visits}" if not any(verdict.lost) else "**lost**"
    for fault in faults:
        print(f"{regime.name}: {fault}", file=sys.stderr)
    return f"| {regime.name} | {scores} | {training} | {counts} |", not faults


def table(quick: bool, only: str = "") -> tuple[str, bool]:
    """The matrix as Markdown, and whether everything passed.

    Args:
        quick: Whether to leave out the slow regimes.
        only: A word that the names of regimes, or of their groups, must hold.
    """
    out, passed = [], True
    chosen = [one for one in ALL if only in f"{one.group} {one.name}" and not (quick and one.slow)]
    for group in dict.fromkeys(regime.group for regime in chosen):
        out += [f"### {group[0].upper()}{group[1:]}", "", HEAD]
        for regime in chosen:
            if regime.group == group:
                text, good = line(regime)
                print(text, file=sys.stderr, flush=True)
                out.append(text)
                passed &= good
        out.append("")
    if only:
        return "\n".join(out), passed
    out += ["### Refused before training", "", "| Regime | why |", "| --- | --- |"]
    out += [f"| {name} | {reason} |" for name, reason in [*((r.name, r.reason) for r in REFUSED), SPLIT]]
    return "\n".join(out), passed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.regimes", description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the matrix as Markdown")
    parser.add_argument("--quick", action="store_true", help="leave out the slow regimes")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the matrix between FILE's markers")
    parser.add_argument("--only", default="", metavar="WORD", help="only regimes, or groups, whose names hold it")
    options = parser.parse_args()
    if not options.table and options.write is None:
        parser.error("nothing to do: pass --table or --write FILE")
    if options.only and options.write is not None:
        parser.error("--write needs all regimes; pass --table --only WORD")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    text, passed = table(options.quick, options.only)
    if options.table:
        print(text)
    if options.write is not None:
        page = options.write.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
