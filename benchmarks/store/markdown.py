"""The sections of a file of ``benchmarks.store``, for results.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import number, table

HEAD = """\
## Gradient store: accuracy over bytes

```bash
python -m benchmarks.store --parts accuracy wide --json store.json --data DIR
```

{data}. One recorded run each; its queries, asked again of the store. Spearman: with the same queries' mu in the run,
over rows, mean over queries, and the worst tenth of them. Retraining: Spearman with retraining, over 55 groups left out
(G1), or over halves of the rows (LDS; G2, FT). "first": the store as it was chosen on G1 and then scored on G2 and FT,
which were held out; it failed there. It was mended on other trainings (the next table), and G2 and FT were scored
again (.643 with the run and .506 with 8,192 entries and int8; .898 and .741 with 65,536 entries). The third time,
here, FT has all of its entries by default, and numbers of mixed width, chosen on G1 and the trainings of the next
table. G1 was asked again without its retrainings. 2 and 4 KB: a run with 8,184 entries.
"""
FAMILY = """\
## Gradient store: trainings it was mended on

```bash
python -m benchmarks.store --parts family --json store.json
```

Trainings like those of the family, two seeds each that nothing was chosen with; "tuned": from fixed weights, after a
training on other rows. Spearman with the same queries' mu in the run: by bytes of a row, in int8 and in mixed widths;
the worst tenth of queries of the default store.
"""
BITS = """\
## Gradient store: what bits cost

```bash
python -m benchmarks.store --parts bits --json store.json
```

5,000 rows of 5,000 components drawn from normal distributions, whose variances have the spectrum, and 50 queries;
Spearman of the stored scores with exact ones, by bytes of a row, in int8 and in mixed widths (and how many numbers).
"""
PEERS = """\
## Gradient store: beside other stores (G2)

```bash
python -m benchmarks.store --parts accuracy peers --protocols g2 --json store.json --data DIR
```

LDS on protocol G2, as in the table above; bytes of a row; CPU seconds of training the networks, of storing all rows,
and of asking 50 queries with their gradients. Ours stores during its one training.
"""
SPEED = """\
## Gradient store: speed and cost

```bash
python -m benchmarks.store --parts speed cost --json store.json --data DIR
```

{rows:,} rows on disk, {threads} threads:
"""
COST = """\
What the store (1 KB a row) adds to a training step, by the plain step; steps with it and without it in turn, CPU
seconds of one thread. `look`, `refresh` and `new basis` (a refresh where the steps have doubled, so that the rows are
moved into another basis) become rare; "steps" are runs of this length, computed from these, "all steps" the mean over
all that were timed. Of GPT-2 small it is the CPU seconds inside of the store's own calls.
"""
WEAK = """\
## Weak groups against retraining

```bash
python -m benchmarks.store --parts weak --json store.json
```

Weak groups of one recorded training on digits, the other groups of the same k-means and random groups of the weak ones'
sizes; {pairs} paired trainings with and without each, of other seeds than the recorded one. Lower: groups whose rows'
scores sum to more than 0 (they lower the query, the validation loss). Sign: groups that retraining gives the same sign.
Moved: those whose change differs from 0 (t-test, p < .05; by chance one in 20). Spearman: of sums and true mu, over
groups. Beyond random: those that move the query further than every random group. Said, size: medians of |mu|, as the
report says it and by retraining; slope: of the true mu on the sums, through 0.
"""
MANY = """\
## Hundreds of queries in the run

```bash
python -m benchmarks.store --parts many --json store.json
```

Each query is the loss of one row. By chunks: directions of some queries after the other, of low rank; else of all at
once. First step: with the refresh, CPU seconds of one thread. GPT-2 small with {queries:.0f} queries, computed from its
shapes: {whole gradients:.0f} GB for the queries' gradients as they are; by chunks of {queries in a chunk:.0f}
directions of at most {directions:.0f} GB, and {making a chunk:.1f} GB while one chunk is made.
"""
SIZES = [f"{size} {dtype}" for size in (256, 512, 1024) for dtype in ("int8", "mixed")]
NAMES = {"g1-sgd": "G1, SGD", "g1-adamw": "G1, AdamW", "g2": "G2", "ft": "FT"}


def section(results: dict[str, Any]) -> Iterable[str]:
    """All parts that the file has."""
    accuracy = results.get("accuracy", {})
    if accuracy:
        yield from curves(results, accuracy)
    if "family" in results:
        yield FAMILY
        yield table(["", "parameters", "entries", "worst tenth", *SIZES], family(results["family"]))
    if "bits" in results:
        yield BITS
        yield table(["spectrum", *SIZES], bits(results["bits"]))
    if "peers" in results:
        yield PEERS
        yield table(["", "networks", "LDS", "bytes", "training", "storing", "asking"], beside(results))
    if "speed" in results or "cost" in results:
        yield from speed(results)
    if "many" in results:
        yield MANY.format(**results["many"]["gpt2"])
        head = ["queries", "by chunks of", "parameters", "first step", "other steps", "peak MB", "variance retained"]
        yield table(head, (many(row) for row in results["many"]["rows"]))
    if "weak" in results:
        yield WEAK.format(pairs=next(iter(results["weak"].values()))["pairs"])
        head = [
            "",
            "groups",
            "lower",
            "sign",
            "moved",
            "moved as said",
            "beyond random",
            "Spearman",
            "said",
            "size",
            "slope",
        ]
        yield table(head, weak(results["weak"]))


def weak(found: dict[str, Any]) -> Iterable[list[str]]:
    """Rows of the table of weak groups."""
    for name, one in found.items():
        for kind in ("weak", "other", "random", "all"):
            if kind in one:
                counts = [str(one[kind][key]) for key in ("groups", "lower")]
                moved = [str(one[kind][key]) for key in ("moved", "moved as said", "beyond random")]
                sizes = [number(one[kind][key]) for key in ("spearman", "said size", "size", "slope")]
                yield [f"{name}, {kind}", *counts, number(one[kind]["sign"]), *moved, *sizes]


def curves(results: dict[str, Any], accuracy: dict[str, Any]) -> Iterable[str]:
    """Accuracy over bytes."""
    yield HEAD.format(data=results["data"])
    rows = []
    for name in (name for name in NAMES if name in accuracy):
        found = accuracy[name]
        rows.append([f"{NAMES[name]}, in the run", "", "", "", number(found["in_run"])])
        points = found["bytes"] | results.get("wide", {}).get(name, {}).get("bytes", {})
        for size, one in points.items():
            numbers = [number(one[key]) for key in ("spearman", "worst_tenth", "retraining")]
            rows.append([f"{NAMES[name]}, {size}", str(one["numbers"]), *numbers])
        for size, one in results.get("first", {}).get(name, {}).get("bytes", {}).items():
            if size == "1024 int8":
                numbers = [number(one[key]) for key in ("spearman", "worst_tenth", "retraining")]
                rows.append([f"{NAMES[name]}, {size}, first", str(one["numbers"]), *numbers])
    yield table(["bytes, type", "numbers", "Spearman with the run", "worst tenth", "retraining"], rows)


def family(found: dict[str, Any]) -> Iterable[list[str]]:
    """Rows of the table of trainings that the store was mended on."""
    for name, one in found.items():
        sizes = [f"{one[key]:,.0f}" for key in ("parameters", "working")]
        yield [name, *sizes, number(one["worst_tenth"]), *(number(one.get(size)) for size in SIZES)]


def bits(found: dict[str, Any]) -> Iterable[list[str]]:
    """Rows of the table of spectra."""
    for name, one in found.items():
        yield [name, *(f"{number(one[size]['spearman'])} ({one[size]['numbers']:,})" for size in SIZES)]


def beside(results: dict[str, Any]) -> Iterable[list[str]]:
    """Rows of the table of stores."""
    ours = results.get("accuracy", {}).get("g2")
    for row in results["peers"].values():
        if "failed" in row:
            yield [row["name"], str(row["networks"]), row["failed"].splitlines()[0][:80], "", "", "", ""]
            continue
        one = dict(row)
        if row["name"] == "ine_callback" and ours:
            one["lds"] = ours["bytes"].get("1024 mixed", ours["bytes"]["1024 int8"])["retraining"]
        seconds = [number(one.get(key)) for key in ("training", "storing", "asking")]
        yield [one["name"], str(one["networks"]), number(one.get("lds")), str(one["bytes_per_row"]), *seconds]


def speed(results: dict[str, Any]) -> Iterable[str]:
    """Seconds of asking, and of steps."""
    if "speed" in results:
        found = results["speed"]
        first = next(iter(found.values()))
        yield SPEED.format(rows=first["rows"], threads=first["threads"])
        named = {"ask": f"{first['queries']} queries", "NumPy": "the same by NumPy", "neighbours": "a row's neighbours"}
        yield table(
            ["", "numbers", "bytes", "", "seconds", "CPU seconds"],
            (
                [name, f"{one['numbers']:,}", f"{one['bytes'] // one['rows']:,}", words]
                + [number(one[f"{k} {unit}"]) for unit in ("seconds", "CPU seconds")]
                for name, one in found.items()
                for k, words in named.items()
            ),
        )
    if "cost" in results:
        yield COST
        keys = list(dict.fromkeys(key for one in results["cost"].values() for key in one["added"]))
        yield table(
            ["", "plain step, ms", *keys],
            (
                [one["what"], number(one["plain_ms"]), *(number(one["added"].get(key)) for key in keys)]
                for one in results["cost"].values()
            ),
        )


def many(row: dict[str, Any]) -> list[str]:
    """A row of the table of many queries."""
    chunk = f"{row['chunk']:.0f}" if row["chunked"] else "all"
    seconds = [number(row["first step"]), number(row["other steps"])]
    parameters = f"{row['parameters']:,}"
    return [str(row["queries"]), chunk, parameters, *seconds, f"{row['peak_mb']:.0f}", f"{row['retained']:.0%}"]
