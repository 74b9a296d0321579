"""How numbers, tails and foreign text are worded, once for terminal, HTML and plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe-Ito blue and vermillion: safe for colour-blind readers
MISSING = "–"
NO_QUERY = (
    "no query was scored by f-INE, whose method was left out of this run; read report.attribution(name), or train "
    "with methods=[FINE(), ...]"
)
NULL_ALARM = 0.01  # a null check with a smaller p-value makes the tests of that query untrustworthy


@dataclass(frozen=True)
class Tails:
    """What the two ends of a query's scores mean.

    Attributes:
        upper: Heading of the rows with the largest scores.
        lower: Heading of the rows with the smallest scores.
        high: One word for a score above 0.
        low: One word for a score below 0.
        suspect: Sign of the end that a reader should inspect: +1 for self-influence, -1 for all other queries, 0 for
            estimands, which have none.
        axis: Name of the score on a plot's axis.
    """

    upper: str
    lower: str
    high: str
    low: str
    suspect: int
    axis: str = "influence μ"

    def color(self, mu: float) -> str:
        """Orange at the suspect end, blue at the other."""
        return ORANGE if mu * self.suspect > 0 else BLUE


_HELP = Tails("Most helpful", "Most harmful", "helpful", "harmful", -1)
_SELF = Tails("Largest self-influence", "Smallest self-influence", "atypical", "typical", 1, "self-influence μ")
_ESTIMAND = Tails("Raise the estimate most", "Lower the estimate most", "raises", "lowers", 0, "influence φ")


def tails(kind: str) -> Tails:
    """The wording of a query kind; for ``"self"`` the upper end is the suspect one.

    Example:
        >>> tails("loss").low, tails("loss").suspect, tails("self").suspect
        ('harmful', -1, 1)
    """
    return {"self": _SELF, "estimand": _ESTIMAND}.get(kind, _HELP)


SIZE = "size not reliable: "  # begins a note of a run whose scores rank rows, but are no numbers of deviations
MEASURED = "size: the spread of "  # begins a note of combined runs, which measure what single runs predict
PREDICTED = "Sizes are of one run: right within a factor of 2 in three of four trainings; combine runs to measure them."
CLOSING = "no closing pass: "  # begins a note of a run whose scores are of its steps alone


def plain(text: object) -> str:
    r"""Text without control characters, so that a foreign report cannot drive a terminal.

    Example:
        >>> plain("val\x1b[31m\nloss")
        'val·[31m·loss'
    """
    return "".join(letter if letter.isprintable() else "·" for letter in str(text))


def decimals(values: Iterable[float] | NDArray[np.float64]) -> int:
    """Decimals that give the largest finite magnitude three digits, so that a column lines up."""
    array = np.abs(np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64))
    largest = float(array[np.isfinite(array)].max(initial=0.0))
    return 2 if largest == 0.0 else int(np.clip(2 - np.floor(np.log10(largest)), 0, 12))


def signed(value: float, places: int) -> str:
    """A score with its sign, which carries the meaning.

    Example:
        >>> signed(1.234, 2), signed(-0.5, 2), signed(float("nan"), 2)
        ('+1.23', '−0.50', '–')
    """
    return f"{value:+.{places}f}".replace("-", "−") if np.isfinite(value) else MISSING


def number(value: float, places: int = 3) -> str:
    """An unsigned number such as a loss."""
    return f"{value:.{places}f}" if np.isfinite(value) else MISSING


def probability(value: float) -> str:
    """A p- or q-value.

    Example:
        >>> probability(0.0312), probability(0.00002), probability(float("nan"))
        ('0.031', '<0.001', '–')
    """
    return MISSING if not np.isfinite(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def null_check(p: float) -> str:
    """The null check of a query in words.

    Example:
        >>> null_check(0.4), null_check(0.0001)
        ('passed (p = 0.400)', 'FAILED (p <0.001)')
    """
    if not np.isfinite(p):
        return "not available"
    return f"{'FAILED' if p < NULL_ALARM else 'passed'} (p {'' if p < 0.001 else '= '}{probability(p)})"
