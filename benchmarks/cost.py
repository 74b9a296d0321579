"""Sections on what a recording costs, for results.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import table

OVERHEAD_HEAD = """\
## Overhead: {what} ({device})

```bash
python -m benchmarks.overhead --workloads {name} --json overhead.json{flags}
```

{parameters:,} parameters, {plain:.1f} ms a plain step. Time of a step by that of the plain step, with the 95 % interval
of the medians' ratio; `look`: a step that observes the curvature too, `refresh`: one that makes new directions. Both
become rare, so whole runs cost what the last columns say. "exact": `rank=None`.
"""
KNOBS_HEAD = """\
## Knobs

```bash
python -m benchmarks.overhead --knobs --json knobs.json --data DIR
```

Mean time of a step by that of a plain step, over a whole training of 200, looks and refreshes among them; and the
scores against those of the exact mode with all other settings left as they are: Spearman over rows, and the error's
standard deviation by the scores'. Default: planned looks and refreshes. Below `rank` the rows are other
estimators, not approximations of this one: there an error says how much the knob changes, not which is right.
"""
FIDELITY = """\
The default against the exact mode, after {visits:.1f} visits a row: {lines}.
Directions kept {kept:.1%} of the signals' variance at least.
"""
TRAINER_HEAD = """\
## Trainer runs with the callback ({device})

```bash
python -m benchmarks.overhead.trainer --json trainer.json
```

`Trainer.fit` over a DataLoader with two workers, {steps} steps after the warm-up, refreshes and curvature updates among
them, one query and self-influence; the closing pass apart.
"""
PROFILE_HEAD = """\
## Operations of a step: {what} ({device})

```bash
python -m benchmarks.overhead.profile --workloads {name} --json profile.json{flags}
```

What runs in an ordinary step by torch.profiler, and the {shown} operations that take most of the time that is added.
"""
SHOWN = 12  # operations of a profile
SPEEDS = "plain_a_second", "ours_a_second"
SCALE_HEAD = """\
## Growth with rows and queries

```bash
python -m benchmarks.scale --json scale.json
```

f-INE's part of a step of {batch} rows, and its state; then the end of the fit: scores with all tests, files, page.
"""


def overhead(results: dict[str, Any]) -> Iterable[str]:
    """A section for each workload of ``benchmarks.overhead``."""
    flags = f" {results['flags']}" if results.get("flags") else ""
    for name, found in results["workloads"].items():
        known = {
            "what": _what(results, found),
            "device": results["device"],
            "name": name,
            "parameters": found["parameters"],
        }
        yield OVERHEAD_HEAD.format(**known, plain=found["plain_ms"], flags=flags)
        lengths: dict[str, float] = next((row["runs"] for row in found["steppers"].values() if "runs" in row), {})
        memory = ["peak memory"] if "peak_memory_ratio" in found["steppers"]["plain"] else []
        yield table(
            ["", "ordinary", "look", "refresh", *(f"{int(n):,} steps" for n in lengths), *memory],
            ([stepper, *_cells(row, list(lengths), bool(memory))] for stepper, row in found["steppers"].items()),
        )
        if "one query and self" not in found["fidelity"]:
            continue
        default = found["fidelity"]["one query and self"]
        lines = [
            f"{query} Spearman {each['spearman']:.4f}, error {each['relative_error']:.3f} of the scores' deviation"
            for query, each in default["queries"].items()
        ]
        visits = next(iter(default["queries"].values()))["visits_a_row"]
        yield FIDELITY.format(visits=visits, lines="; ".join(lines), kept=default["kept_share"] or 1.0)


def _what(results: dict[str, Any], found: dict[str, Any]) -> str:
    return f"{found['what']}, compiled" if results.get("compiled") else str(found["what"])


def profile(results: dict[str, Any]) -> Iterable[str]:
    """A section for each workload of ``benchmarks.overhead.profile``."""
    for name, found in results["workloads"].items():
        flags = " --compile" if results["compiled"] else ""
        yield PROFILE_HEAD.format(
            what=_what(results, found), device=results["device"], name=name, flags=flags, shown=SHOWN
        )
        rows = found["steppers"].items()
        yield table(["", "operations", "ms"], ([each, f"{r['operations']:,.0f}", f"{r['ms']:.2f}"] for each, r in rows))
        for each, row in rows:
            added = list(row["added"].items())[:SHOWN]
            if added:
                cells = ([f"`{key[:80]}`", f"{count:+.0f}", f"{ms:+.3f}"] for key, (count, ms) in added)
                yield table([each, "operations", "ms"], cells)


def trainer(results: dict[str, Any]) -> Iterable[str]:
    """The section of a file of ``benchmarks.overhead.trainer``."""
    yield TRAINER_HEAD.format(device=results["device"], steps=results["steps"])
    yield table(
        ["", "batch", "precision", "plain, a second", "with the callback", "fraction", "peak memory", "fit's end, s"],
        (
            [
                r["what"],
                f"{r['batch']}",
                r["precision"],
                *(f"{r[key]:,.0f} {'tokens' if r['tokens_a_row'] > 1 else 'rows'}" for key in SPEEDS),
                f"{r['fraction']:.3f}",
                f"{r['peak_memory_ratio']:.3f}" if r["peak_memory_ratio"] else "",
                f"{r['end_s']:.1f}",
            ]
            for r in results["runs"]
        ),
    )


def knobs(results: dict[str, Any]) -> Iterable[str]:
    """The section of a file of ``benchmarks.overhead --knobs``."""
    yield KNOBS_HEAD
    for found in results["workloads"].values():
        visits = next(iter(next(iter(found["fidelity"].values()))["queries"].values()))["visits_a_row"]
        yield f"{found['what']}, {visits:.1f} visits a row:"
        yield table(
            ["one query and self", "mean step", "val, Spearman", "error", "self, Spearman", "error"],
            (
                [name, f"{found['steppers'][name]['mean']:.2f}", *_agreement(each)]
                for name, each in found["fidelity"].items()
            ),
        )


def _agreement(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['queries'][query][key]:.3f}" for query in ("val", "self") for key in ("spearman", "relative_error")
    ]


def _cells(row: dict[str, Any], lengths: list[str], memory: bool) -> list[str]:
    kinds = []
    for kind in ("ordinary", "look", "refresh"):
        found = row.get(kind)
        low, high = found["interval"] if found else (0.0, 0.0)
        kinds.append(f"{found['ratio']:.2f} ({low:.2f}–{high:.2f})" if found else "")
    runs = [f"{row['runs'][n]:.2f}" if "runs" in row else "" for n in lengths]
    peak = f"{row['peak_memory_ratio']:.3f}" if "peak_memory_ratio" in row else ""
    return [*kinds, *runs, *([peak] if memory else [])]


def scale(results: dict[str, Any]) -> Iterable[str]:
    """The section of a file of ``benchmarks.scale``."""
    yield SCALE_HEAD.format(batch=results["batch"])
    yield table(
        ["rows", "queries", "accumulators", "ms a step", "state, MB"],
        (
            [
                f"{r['rows']:,}",
                f"{r['queries']}",
                f"{r['rows'] * r['queries']:,}",
                f"{r['fold_ms']:.2f}",
                f"{r['state_bytes'] / 1e6:,.1f}",
            ]
            for r in results["steps"]
        ),
    )
    columns = {"scores_s": "scores", "save_s": "save", "html_s": "page", "fit_end_s": "fit end, s", "load_s": "load"}
    yield table(
        ["rows", "queries", *columns.values(), "files, MB"],
        (
            [f"{r['rows']:,}", f"{r['queries']}"]
            + [f"{r[c]:.2f}" for c in columns]
            + [f"{(r['file_bytes'] + r['html_bytes']) / 1e6:,.1f}"]
            for r in results["ends"]
        ),
    )
