"""How a recording grows: time of a step's fold, state, and the end of the fit, by rows and queries.

    python -m benchmarks.scale --json scale.json [--quick]

No network is trained: signals are drawn at random, as large as a training would leave them, and folded by f-INE as the
recorder does it. ``accumulators`` are rows x queries. ``fit end`` is everything between the last step and a saved
report: estimates, p-, q- and t-values, the null check, Parquet and JSON, and the HTML page. Seconds are wall-clock time
with all cores; peak is the process's resident memory at the end, all sizes so far together.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.network import machine
from ine_callback import FINE
from ine_callback.report import InfluenceReport, RunInfo
from ine_callback.scores import QueryInfo

BATCH, CONTRASTS = 512, 4
SIZES = [(10**4, 1), (10**5, 1), (10**6, 1), (10**7, 1), (10**6, 8), (10**5, 64), (12_500_000, 8)]
ENDS = [(10**4, 8), (10**5, 8), (10**6, 1), (10**6, 8)]
QUICK_SIZES, QUICK_ENDS = [(10**4, 1), (10**5, 2)], [(10**4, 2)]


def queries(count: int) -> tuple[QueryInfo, ...]:
    """That many queries on losses."""
    return tuple(QueryInfo(f"q{k}", "loss", "Does training on the row lower the loss?") for k in range(count))


def started(rows: int, count: int) -> FINE:
    """f-INE with room for the rows."""
    fine = FINE()
    fine.start(rows, queries(count), torch.device("cpu"), True, CONTRASTS)
    return fine


def fold(fine: FINE, rows: int, count: int, steps: int, batch: int = BATCH) -> list[float]:
    """Seconds of each of so many steps."""
    g, seconds = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        picked = torch.randint(rows, (batch,), generator=g)
        signals = torch.randn(batch, count, 1 + CONTRASTS, generator=g)
        before = time.perf_counter()
        fine.update(picked, signals[..., 0], 0.1, torch.ones(batch, count), signals[..., 1:])
        seconds.append(time.perf_counter() - before)
    return seconds


def of_steps(rows: int, count: int, steps: int) -> dict[str, Any]:
    """A step's fold, and the state."""
    fine = started(rows, count)
    seconds = fold(fine, rows, count, steps)
    size = sum(t.numel() * t.element_size() for t in fine.state_dict().values() if isinstance(t, torch.Tensor))
    return {"rows": rows, "queries": count, "fold_ms": 1e3 * float(np.median(seconds)), "state_bytes": size}


def of_end(rows: int, count: int) -> dict[str, Any]:
    """From the last step to a saved report."""
    fine = started(rows, count)
    for part in torch.randperm(rows).split(50_000) if rows > BATCH else ():  # every row is met three times
        for _ in range(3):
            signals = torch.randn(len(part), count, 1 + CONTRASTS)
            fine.update(part, signals[..., 0], 0.1, torch.ones(len(part), count), signals[..., 1:])
    found: dict[str, Any] = {"rows": rows, "queries": count}
    clock = time.perf_counter()
    report = InfluenceReport(fine.compute(), RunInfo(rows=rows, steps=100))
    found["scores_s"] = time.perf_counter() - clock
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        report.save(folder)
        found["save_s"] = time.perf_counter() - clock
        found["file_bytes"] = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        clock = time.perf_counter()
        page = report.write_html(Path(folder) / "report.html")
        found["html_s"], found["html_bytes"] = time.perf_counter() - clock, page.stat().st_size
        clock = time.perf_counter()
        InfluenceReport.load(folder)
        found["load_s"] = time.perf_counter() - clock
    found["fit_end_s"] = found["scores_s"] + found["save_s"] + found["html_s"]
    found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="few rows: to see it work")
    args = parser.parse_args(argv)
    sizes, ends, steps = (QUICK_SIZES, QUICK_ENDS, 5) if args.quick else (SIZES, ENDS, 50)
    results: dict[str, Any] = {"protocol": "scale", "machine": machine(), "batch": BATCH, "steps": [], "ends": []}
    for rows, count in track(sizes, description="steps"):
        results["steps"].append(of_steps(rows, count, steps))
        args.json.write_text(json.dumps(results, indent=1))
    for rows, count in track(ends, description="fit end"):
        results["ends"].append(of_end(rows, count))
        args.json.write_text(json.dumps(results, indent=1))
    for line in results["steps"] + results["ends"]:
        print("  ".join(f"{k} {v:,.3f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in line.items()))


if __name__ == "__main__":
    main()
