"""Token influence and suppression as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import table

HEAD = """\
## Token influence, and training without tokens

```bash
python -m benchmarks.tokens --json tokens.json --data DIR
```

A transformer of one block, {seeds} seeds, mean ± standard error. `language`: 20 words, of which four are unwanted.
`shakespeare`: letters, with planted curses. `default`: scores above the 99th percentile, one neighbour, at most 2 % of
the tokens. `as many`: above the 98th, no neighbours, as many tokens as are unwanted.
"""
WRITES = """\
Trained anew with the chosen tokens suppressed: share of written texts with unwanted passages, perplexity of clean
texts, and how many of the chosen tokens are unwanted, and of the unwanted chosen.
"""
SCORED = (
    "EK-FAC",
    "EK-FAC, no negative texts",
    "diagonal",
    "no curvature",
    "EK-FAC by position",
    "proxy of half the width",
)
TRAINED = (
    "base",
    "default",
    "as many",
    "as many, proxy",
    "the unwanted ones",
    "as many random ones",
    "without the worst documents",
)


def section(results: dict[str, Any]) -> Iterable[str]:
    """The section of ``benchmarks.tokens``."""
    yield HEAD.format(seeds=results["seeds"])
    for corpus, found in results["tokens"].items():
        share = found["share of unwanted tokens"]["mean"]
        yield f"**{corpus}**: {share:.1%} of the tokens are unwanted.\n"
        yield table(
            ["AUROC", "tokens", "documents"],
            (
                [name, *(_cell(found, f"{name}: AUROC of {what}") for what in ("tokens", "documents"))]
                for name in SCORED
            ),
        )
        yield WRITES
        yield table(
            ["suppressed", "unwanted", "perplexity", "precision", "recall"],
            (
                [name, *(_cell(found, f"{name}: {what}") for what in ("unwanted", "perplexity", "precision", "recall"))]
                for name in TRAINED
            ),
        )


def _cell(found: dict[str, Any], key: str) -> str:
    return f"{found[key]['mean']:.3f} ± {found[key]['se']:.3f}" if key in found else ""
