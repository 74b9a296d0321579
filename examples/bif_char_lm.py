"""Which characters of which passages taught a small transformer? Bayesian influence (BIF) by row and by character.

The rows and documents of char_lm.py, and a model a sixth as large. Beside f-INE, which is recorded while the model
trains, SGLD chains run after half of the training and at its end. The report says whether the chains can be believed
and how far both methods agree; the passages are shown with the characters that did it. The chains take three minutes of
one core; fewer ``--draws`` take less, and the noise check will say so.

    python examples/bif_char_lm.py                  # four poems, in examples/excerpt.txt
    python examples/bif_char_lm.py --out DIR        # with report.html
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from scipy.stats import spearmanr

from ine_callback import BIF, FINE, InfluenceCallback
from ine_callback.report import Text as Characters

sys.path.insert(0, str(Path(__file__).parent))
from char_lm import LENGTH, encode, fit, options, quiet, rows_and_queries


def coloured(piece: str, scores: np.ndarray) -> Text:
    """A row's characters; the deeper the colour behind the one to predict, the more it helped (blue) or harmed."""
    largest = float(np.abs(scores).max()) or 1.0
    text = Text(piece[0].replace("\n", "⏎"))
    for character, score in zip(piece[1:], scores, strict=True):
        strength = int(200 * abs(score) / largest)
        shade = (
            f"rgb({255 - strength},{255 - strength // 3},255)" if score > 0 else f"rgb(255,{255 - strength // 2},120)"
        )
        text.append(character.replace("\n", "⏎"), f"black on {shade if strength > 20 else 'white'}")
    return text


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(epochs=40)
    parser.add_argument("--rows", type=int, default=None, help="rows scored by the chains; by default all")
    parser.add_argument("--draws", type=int, default=250)
    args = parser.parse_args()
    quiet()
    rows, queries, alphabet = rows_and_queries(args)
    stages = [max(1, args.epochs // 2), "end"]
    # a step passes over all rows, so a draw is taken after each
    chains = BIF(chains=4, draws=args.draws, thinning=1, rows=args.rows, per_token=True, at=stages)
    influence = InfluenceCallback(queries=queries, methods=[FINE(), chains], dirpath=args.out)
    train = encode([piece for _, piece in rows], alphabet)
    trainer, _ = fit(train, len(alphabet), [influence], args.epochs, args.seed, width=32, depth=1)
    report, console = influence.report, Console()
    print(f"Trained {trainer.global_step} steps to a loss of {trainer.callback_metrics['loss']:.2f} a character.")

    for found in report.stages("BIF"):
        when = "end of training" if found.at == "end" else f"epoch {found.at}"
        state = "all checks passed" if found.reliable else "UNRELIABLE: " + "; ".join(found.reasons)
        print(f"\nChains at {when}: {len(found.rows)} rows, {found.loss.shape[1]} draws of {len(found.loss)}; {state}")
    found = report.bif
    for column, title in enumerate(report.queries):
        mu, bif = report.scores.mu[found.rows, column], found.ranking[:, column]
        agreement = spearmanr(mu, bif).statistic
        print(f"\n{title}: rank agreement of BIF with f-INE's μ {agreement:.2f}; what helped most:")
        for row in found.top(3, title):
            k = int(np.flatnonzero(found.rows == row)[0])
            source, piece = rows[row]
            console.print(
                Text(f"  row {row:4d}  BIF {bif[k]:+.2g} ± {found.se[k, column]:.0g}  {source.split(' (')[0]:12s} ")
                + coloured(piece[: LENGTH + 1], found.tokens.of(k)[:, column]),
                soft_wrap=True,
            )
    if args.out is not None:  # again, with characters in place of their numbers
        pieces = [piece for _, piece in rows]
        report.write_html(args.out / "report.html", samples=pieces, render=lambda piece: Characters(list(piece[1:])))
        print(f"\nSaved: InfluenceReport.load({str(args.out)!r})")


if __name__ == "__main__":
    main()
