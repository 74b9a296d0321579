"""Renders the measurements as Markdown, as a whole or the sections of some files in place of older ones.

python -m benchmarks.results FILES... --notes benchmarks/notes.md --plots benchmarks/plots > benchmarks/RESULTS.md
python -m benchmarks.results FILES... --into benchmarks/RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cost, label_tables, layer_tables, values_tables
from benchmarks.effects import markdown as effects
from benchmarks.fairness import markdown as fairness
from benchmarks.family import markdown as family
from benchmarks.finetuning import markdown as finetuning
from benchmarks.influence import markdown as influence
from benchmarks.markdown import number, table
from benchmarks.pictures import PLOTS
from benchmarks.store import markdown as store
from benchmarks.tokens import markdown as tokens

HEAD = """\
# How good are the scores?

Generated from the benchmarks' JSON files by `python -m benchmarks.results FILES... --notes benchmarks/notes.md --plots
benchmarks/plots > benchmarks/RESULTS.md`; edit notes.md instead. Scores are those of one training run recorded by
`Recorder` in a bare PyTorch loop, truths those of retraining. All numbers are means over the seeds named. Seconds are
CPU seconds of one thread on a two-core machine without accelerator, shared with other work: differences of less than a
half say nothing.
"""

G1_HEAD = """\
## Protocol G1: against retraining without each group, {optimizer}

```bash
{command}
```

1,000 rows ({data}; 10 % of the labels flipped), MLP 50-32-10, 160 steps, {seeds} seeds. 55 groups of 50-100 rows
(random, classes, flipped rows) and 200 queries, each the loss of one held-out row. {truth}
"""

LDS_HEAD = """\
## {title}: {what}

```bash
python -m benchmarks.lds --problems {problem} --json lds.json{data} --truth 'truth-{{problem}}.pt'{left_out}
```

{rows} rows, {queries} queries posed by their loss and by their negated margin, {epochs} epochs. Half of the rows left
out, 60 times, {runs} retrainings each: linear data-modelling score (LDS), mean over queries.{loo} Two halves of the
retrainings agree to: {reliability}. Seconds of one thread with the training of the models needed; MB at the peak,
above the start.
"""

RANDOMNESS_HEAD = """\
## Stability of one run's scores ({data})

```bash
python -m benchmarks.randomness --json randomness.json{flag} --seeds {seeds}
```

G1's rows and network, {seeds} runs of each training setting. One run against the mean of the others (multi-run),
against another run (pairs), and the mean of a setting's runs against the mean of the base's. Jaccard: of the 10 % and
20 % most suspicious rows. Same sign of flagged: of the rows with q ≤ .05 in one run. Coverage: how often one run's
μ ± 1.96 se holds the mean of the other runs. ± half a 95 % interval over runs.
"""

RUNS_HEAD = """\
## Several runs: intervals and flags

```bash
python -m benchmarks.runs --json runs.json
```

{runs} runs on 500 digits of scikit-learn, {wrong} of them with a wrong label, 160 steps of SGD. Combinations of R runs
against the mean of all the others: how often μ ± 1.96 se holds it, and what self-influence lists at q ≤ .05.
"""

MISLABEL_HEAD = """\
## Wrong labels: {problem}

```bash
python -m benchmarks.mislabel --problems {problem} --seeds {seeds} --json mislabel.json --data DIR
```

{rows} rows, {noise:.1%} of the labels wrong, {seeds} seeds, ± half a 95 % interval over seeds. Mean loss less this: the
paired difference of the AUROCs, the mean loss in the run being the score that the package recommends for labels. A
small multilayer perceptron for digits, a small convolutional network for CIFAR-10N at 16 x 16 pixels; SGD with
momentum, cosine.
"""

CLEANUP_HEAD = """\
## Acting on it: {problem}

```bash
python -m benchmarks.cleanup --problems {problem} --seeds {seeds} --json cleanup.json --data DIR
```

{rows} rows, {noise:.1%} of the labels wrong. Each of {seeds} seeds records one run and trains anew, from other first
weights, without as many rows as `report.unlike_batch_mates()` lists, chosen by each score. Accuracy in per cent on
{tests:,} clean test rows that no query saw, and its paired differences; ± half a 95 % interval over seeds. Networks as
under "Wrong labels". Below: the labels that `report.suggest_labels()` proposes for the listed rows, means over seeds.
"""

OWN_HEAD = """\
Influence of a row on its own loss: {count} rows left out one at a time (two fifths of them flipped), in trainings
that share initial weights and order with one that has them; standard error of a true score {error:.3f}. Spearman over
all rows and each kind. The slope has an intercept, for scores of self-influence are differences to an average row; a
loss has other units, so its slope means nothing.
"""

BIF_HEAD = """\
## BIF by the number of draws

```bash
python -m benchmarks.bif --json bif.json{data} --truth truth-sgd.pt
```

Protocol G1 under SGD ({data_name}): 8 chains around a trained network, n_beta = localization = 100, mean over two
networks. Per-query Spearman of group sums with the truth; ms: CPU milliseconds of a draw (8 chains, 1,000 rows, 200
queries). Shrunk: drawn towards the Laplace term, whose own agreement is {laplace:.3f}.
"""

DEVINTERP_HEAD = """\
## BIF beside devinterp

```bash
python -m benchmarks.bif_devinterp --json bif-devinterp.json{data} --draws {draws} --calls {calls}
```

One trained network of protocol G1 ({data_name}), plain SGLD on both sides: {chains} chains of {draws} draws in a call,
{calls} calls of each library in turn, thinning {thinning}, minibatches of {batch_size}, burn-in {burn_in},
ε = {step_size:g}, n_beta = {n_beta:g}, localization = {localization:g}. Milliseconds: CPU time of a draw of all chains,
over the calls. Agreement: Pearson's correlation of the covariances of 1,000 rows and 200 queries between two halves of
the calls. Two libraries cannot agree better than one agrees with itself. devinterp's covariances are {scale:.2f} times
ours.
"""

RESUME_HEAD = """\
## Killed and resumed

```bash
python -m benchmarks.resume --trials {trials} --json resume.json
```

Trainings of 30 steps with checkpoints every second step, killed (SIGKILL) at random moments and resumed; a journal of
another callback says what was trained on. Lost: visits that the report lacks or has too many. Same batches: trials with
the batches of a training that nobody killed; all arrays of their reports and the weights are compared with it, bit by
bit. In the others Lightning itself repeated batches (see the program).
"""

NAMES = {"sgd": "SGD .1", "adamw": "AdamW 3e-3, cosine"}
COLUMNS = {
    "spearman_per_query": "Spearman per query",
    "pearson": "Pearson",
    "slope": "slope",
    "average_of_runs_spearman": "Spearman, mean of {seeds} runs",
    "auroc_mislabel": "AUROC of flipped labels",
    "seed_spearman": "Spearman between seeds",
    "jaccard_top10": "Jaccard of top 10 % between seeds",
    "seconds": "seconds",
}
LEGEND = """\
Spearman per query: over the 55 groups, mean over queries. Slope: of the truth on the estimate; below 1, estimates
are too large. AUROC and seeds: the most suspicious rows are those with the lowest mean score over queries (or the
highest self-influence or loss). Plain training without a recorder: {plain:.2f} s.
"""


def g1(results: dict[str, Any]) -> Iterable[str]:
    """Sections of a file of ``benchmarks.fidelity``, one for each optimizer."""
    for optimizer, found in results["optimizers"].items():
        seeds, truth = results["seeds"], found["truth"]
        flags = " --sweep" if found["study"] == "sweep" else ""
        data = "" if results["data"].startswith("scikit") else " --data DIR"
        many = f" --runs {truth['runs']:.0f}" if truth and truth["runs"] != 512 else ""
        yield G1_HEAD.format(
            optimizer=NAMES[optimizer] + (", intervals" if flags else "") + ("" if data else ", second data set"),
            data=results["data"],
            seeds=seeds,
            truth=of_truth(truth),
            command=f"python -m benchmarks.fidelity --json fidelity.json{data} --truth 'truth-{{optimizer}}.pt' "
            f"--optimizers {optimizer} --seeds {seeds}{many}{flags}",
        )
        keys = [key for key in COLUMNS if any(key in row for row in found["rows"].values())]
        head = ["", *(COLUMNS[key].format(seeds=seeds) for key in keys)]
        yield table(head, ([name, *(number(row.get(key)) for key in keys)] for name, row in found["rows"].items()))
        yield LEGEND.format(plain=found["seconds_without_recorder"])
        curve = found["rows"].get("default", {}).get("by_runs", {})
        if curve:
            yield "The mean score of R runs of the default, over all choices of R of the seeds:"
            head = ["R", *(COLUMNS[key] for key in ("spearman_per_query", "auroc_mislabel"))]
            yield table(head, ([size, *map(number, row.values())] for size, row in curve.items()))
        if "own" in found:
            yield from own(found["own"])


def own(found: dict[str, Any]) -> Iterable[str]:
    """Self-influence against leaving single rows out."""
    names = {"spearman": "Spearman", "spearman_flipped": "flipped rows", "spearman_others": "other rows"}
    names |= {"pearson": "Pearson", "slope": "slope"}
    yield OWN_HEAD.format(count=found["count"], error=found["standard_error"])
    yield table(["", *names.values()], ([n, *(number(row[k]) for k in names)] for n, row in found["rows"].items()))


def of_truth(truth: dict[str, float]) -> str:
    if not truth:
        return "The truth was read from a file (see above)."
    out = f"{truth['runs']:.0f} retrainings a group, standard error of a true score: {truth['standard_error']:.2f}"
    if "split_half_spearman" in truth:
        out += f"; two halves of the retrainings rank the groups alike to {truth['split_half_spearman']:.3f}"
        out += f" (reliability of the whole {truth['split_half_reliability']:.3f})"
    return out + "."


def bif(results: dict[str, Any]) -> Iterable[str]:
    """The section of ``benchmarks.bif``."""
    variants = results["variants"]
    draws = sorted({d for row in variants.values() for d in row if d.isdigit()}, key=int)
    mnist = results["data"].startswith("10,000")
    laplace = next(iter(variants.values()))[draws[0]]["laplace"]
    yield BIF_HEAD.format(data=" --data DIR" if mnist else "", data_name=results["data"], laplace=laplace)
    rows = []
    for name, row in variants.items():
        for key, words in (("spearman_per_query", name), ("shrunk", f"{name}, shrunk")):
            rows.append([words, *(number(row.get(d, {}).get(key)) for d in draws), number(row["milliseconds_a_draw"])])
    yield table(["", *(f"{d} draws" for d in draws), "ms"], rows)


def bif_devinterp(results: dict[str, Any]) -> Iterable[str]:
    """The section of ``benchmarks.bif_devinterp``."""
    flag = " --data DIR" if results["data"].startswith("10,000") else ""
    yield DEVINTERP_HEAD.format(**(results | {"data": flag, "data_name": results["data"]}))
    measured = {f"{name}, ms a draw": each for name, each in results["milliseconds_a_draw"].items()}
    measured["devinterp over ine_callback"] = results["times_faster"]
    spread = {"median": 50, "least": 0, "most": 100}
    yield table(
        ["", *spread],
        ([name, *(number(float(np.percentile(each, q))) for q in spread.values())] for name, each in measured.items()),
    )
    yield table(["Agreement", "Pearson"], ([name, number(value)] for name, value in results["agreement"].items()))


def merged(found: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The files with those of ``benchmarks.lds`` put together; of equal rows the later file's counts."""
    parts = [results for results in found if results["protocol"] == "lds"]
    for results in found:
        if results["protocol"] != "lds":
            yield results
        elif results is parts[0]:
            rows = {(row["protocol"], row["name"]): row for part in parts for row in part["rows"]}
            problems = {name: one for part in parts for name, one in part["problems"].items()}
            yield {**results, "problems": problems, "rows": list(rows.values())}


def lds(results: dict[str, Any]) -> Iterable[str]:
    """One section for each problem of ``benchmarks.lds``."""
    names = {"lds_loss": "LDS, losses", "lds_margin": "LDS, margins"}
    names |= {"loo_loss": "left out, losses", "loo_margin": "left out, margins"}
    for problem, about in results["problems"].items():
        rows = [row for row in results["rows"] if row["protocol"] == problem]
        keys = [key for key in names if any(key in row for row in rows)]
        yield LDS_HEAD.format(
            title="Protocol G2" if problem == "g2" else f"Retraining, {problem}",
            problem=problem,
            data="" if results["data"].startswith("scikit") else " --data DIR",
            left_out=(f" --runs {about['runs']}" if about["runs"] != 4 else "")
            + (f" --left-out {about['left_out']}" if about["left_out"] else ""),
            loo=" 50 rows left out one at a time, paired: Spearman over them." if about["left_out"] else "",
            reliability=", ".join(f"{names[k]} {v:.2f}" for k, v in about["reliability"].items()),
            **{key: about[key] for key in ("what", "rows", "queries", "epochs", "runs")},
        )
        yield table(
            ["", "models", *(names[key] for key in keys), "seconds", "MB"],
            (
                [row["name"], str(row["models"])]
                + ([row["failed"].splitlines()[0][:80]] if "failed" in row else [number(row.get(key)) for key in keys])
                + ([] if "failed" in row else [f"{row['seconds']:.0f}", f"{row['peak_mb']:.0f}"])
                for row in rows
            ),
        )


def randomness(results: dict[str, Any]) -> Iterable[str]:
    """The section of a file of ``benchmarks.randomness``, one table for each query."""
    flag = "" if results["data"].startswith("scikit") else " --data DIR"
    yield RANDOMNESS_HEAD.format(data=results["data"], flag=flag, seeds=results["seeds"])
    columns = {
        "spearman_mean_of_others": "Spearman, multi-run",
        "spearman": "Spearman, pairs",
        "jaccard_10": "Jaccard 10 %",
        "jaccard_20": "Jaccard 20 %",
        "same_sign": "same sign",
        "same_sign_flagged": "same sign of flagged",
        "coverage": "coverage",
    }
    for query in next(iter(results["settings"].values())):
        yield f"Query: {query}\n"
        head = ["", *columns.values(), "Spearman to base", "Jaccard 10 % to base"]
        rows = []
        for name, queries in results["settings"].items():
            row = queries[query]
            base = row["to_base"]
            rows.append([name, *(f"{row[c][0]:.2f} ± {row[c][1]:.2f}" for c in columns)])
            rows[-1] += [f"{base['spearman']:.2f}", f"{base['jaccard_10']:.2f}"]
        yield table(head, rows)


def runs(results: dict[str, Any]) -> Iterable[str]:
    """The section of a file of ``benchmarks.runs``."""
    yield RUNS_HEAD.format(runs=results["runs"], wrong=results["wrong"])
    sizes = list(results["rows"])
    names = list(results["rows"][sizes[0]])
    yield table(
        ["", *(f"R = {s}" for s in sizes)], ([n, *(number(results["rows"][s][n]) for s in sizes)] for n in names)
    )


def mislabel(results: dict[str, Any]) -> Iterable[str]:
    """The sections of a file of ``benchmarks.mislabel``."""
    columns = {"auroc": "AUROC", "average_precision": "average precision", "recall_at_noise_rate": "recall"}
    columns |= {"mean_loss_minus_this": "mean loss less this"}
    stable = {"seed_spearman": "Spearman of seeds", "jaccard_top10": "Jaccard 10 %", "jaccard_top20": "Jaccard 20 %"}
    for problem, found in results["problems"].items():
        yield MISLABEL_HEAD.format(problem=problem, **{key: found[key] for key in ("seeds", "rows", "noise")})
        yield table(
            ["", *columns.values(), *stable.values()],
            (
                [name]
                + [f"{row[c]:.3f} ± {row[f'{c}_half_width']:.3f}" for c in columns]
                + [f"{row[c]:.2f}" for c in stable]
                for name, row in found["scores"].items()
            ),
        )


def cleanup(results: dict[str, Any]) -> Iterable[str]:
    """The sections of a file of ``benchmarks.cleanup``."""
    columns = {"accuracy": "accuracy", "minus_none": "less nothing", "minus_random": "less random"}
    columns["minus_loss"] = "less highest final loss"
    for problem, found in results["problems"].items():
        about = {key: found[key] for key in ("seeds", "rows", "noise", "tests")}
        yield CLEANUP_HEAD.format(problem=problem, **about)
        yield table(
            ["dropped", "rows", "of these wrong", *columns.values()],
            (
                [name, f"{row['dropped']:.0f}", f"{row['wrong']:.0%}" if row["dropped"] else ""]
                + [f"{100 * row[c]:.2f} ± {100 * row[f'{c}_half_width']:.2f}" for c in columns]
                for name, row in found["arms"].items()
            ),
        )
        yield table(["suggested labels", ""], ([key, number(value)] for key, value in found["suggestions"].items()))


def resume(results: dict[str, Any]) -> Iterable[str]:
    """The section of ``benchmarks.resume``."""
    (found,) = results["rows"]
    yield RESUME_HEAD.format(trials=found["trials"])
    shown = {k: found[k] for k in ("trials", "kills", "resumed", "lost", "same batches")}
    shown["of these differing"] = max(found["differing"].values(), default=0)
    yield table([*shown], [[str(value) for value in shown.values()]])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of the benchmarks, in the order wanted")
    parser.add_argument("--notes", type=Path, help="Markdown put after the introduction")
    parser.add_argument("--plots", type=Path, help="folder for the pictures, beside the Markdown file")
    parser.add_argument("--into", type=Path, help="Markdown file in which only these files' sections are renewed")
    args = parser.parse_args(argv)
    parts = [] if args.into else [HEAD]
    if args.notes:
        parts.append(args.notes.read_text())
    sections = {"g1": g1, "lds": lds, "runs": runs, "mislabel": mislabel, "randomness": randomness, "bif": bif}
    sections |= {
        "bif_devinterp": bif_devinterp,
        "resume": resume,
        "overhead": cost.overhead,
        "trainer": cost.trainer,
        "profile": cost.profile,
        "scale": cost.scale,
        "knobs": cost.knobs,
    }
    sections |= {"cleanup": cleanup, "family": family.section, "finetuning": finetuning.section}
    sections |= {"label_errors": label_tables.label_errors, "layers": layer_tables.layers}
    sections |= {"values": values_tables.values, "values_airrep": values_tables.airrep}
    sections |= {"influence": influence.section, "tokens": tokens.section, "fairness": fairness.section}
    sections |= {"effects": effects.section, "store": store.section}
    for results in merged([json.loads(file.read_text()) for file in args.files]):
        parts += list(sections[results["protocol"]](results))
        if args.plots and results["protocol"] in PLOTS:
            file = args.plots / f"{results['protocol']}.png"
            PLOTS[results["protocol"]](results, file)
            parts.append(f"![{results['protocol']}]({args.plots.name}/{file.name})")
    text = "\n".join(part.rstrip("\n") + "\n" for part in parts)
    if args.into:
        args.into.write_text(renewed(args.into.read_text(), text))
    else:
        print(text, end="")


def renewed(old: str, new: str) -> str:
    r"""The old Markdown with each section of the new in place of the one of the same heading, or else at the end.

    >>> renewed("# R\n\n## A\n1\n\n## B\n2\n", "## C\n5\n\n## A\n3\n")
    '# R\n\n## A\n3\n\n## B\n2\n\n## C\n5\n'
    """

    def sections(text: str) -> dict[str, str]:
        parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
        return {
            part.partition("\n")[0] if part.startswith("## ") else "": part.strip("\n") + "\n" for part in parts if part
        }

    return "\n".join((sections(old) | sections(new)).values())


if __name__ == "__main__":
    main()
