"""The results as a section of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import number, table

HEAD = """\
## Fine-tuning a small language model (protocol FT), dropout {dropout}

```bash
python -m benchmarks.finetuning --json finetuning.json{data} --truth truth.pt --dropout {dropout}
```

A GPT of {parameters:,} parameters (width {width}, {depth} blocks, tied head, {vocabulary} byte pairs), pre-trained on
the first half of {text} and fine-tuned on {rows} documents of the other half: AdamW, {epochs} epochs of batches of
{batch}, always from the same weights (`initial_weights="fixed"`). Truth: {halves} independent random halves x
{retrained} seeds; {queries} held-out documents of the same scenes as queries. The truth's reliability is
{reliability:.3f}, the most an LDS can be {ceiling:.3f}.
"""
LEGEND = """\
LDS: Spearman over halves, mean over queries and runs (seeds {seeds}), with a 95 % interval over halves and
queries; then that of the runs' mean score. Slope: of the truth on the scores' sums over halves, in units of the loss
and in standard deviations over trainings on all documents; below 1, scores are too large. Fine-tuning on half of the
documents is also half of the steps: scores at the end, which know no steps, may have slopes of up to 2. R: summed
learning rate times Adam's rate. TracIn: gradient dot. Seconds with the training.
"""


def section(results: dict[str, Any]) -> Iterable[str]:
    """A table for each probability of dropout."""
    for dropout, found in results["dropout"].items():
        facts = {k: results[k] for k in ("text", "parameters", "vocabulary", "rows", "queries", "halves")}
        facts |= {k: results["training"][k] for k in ("width", "depth", "epochs", "batch")}
        truth = {"reliability": float("nan"), "ceiling": float("nan")} | found["truth"]
        yield HEAD.format(
            dropout=dropout,
            data=" --data DIR" if results["text"] == "tinyshakespeare" else "",
            retrained=results["retrained"],
            **{k: truth[k] for k in ("reliability", "ceiling")},
            **facts,
        )
        yield table(
            ["", "LDS", "interval", "mean of runs", "slope, loss", "slope, sd", "seconds"],
            (_cells(name, row) for name, row in found["rows"].items()),
        )
        yield LEGEND.format(seeds=", ".join(map(str, results["seeds"])))


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    slopes = (number(row.get(key)) for key in ("slope_loss", "slope_sd"))
    seconds = f"{row['seconds']:.1f}"
    return [name, number(row["lds"]), f"{low:.3f} to {high:.3f}", number(row["mean_of_runs"]), *slopes, seconds]
