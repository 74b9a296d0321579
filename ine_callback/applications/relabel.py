"""Which label a suspected row may really have, and how certain that is.

With out-of-fold class probabilities P [N, C] the given labels y are taken as drawn from ``P^(1/T)`` (normalized) and
then replaced, with probability e, by one of the other C - 1 classes. Noise rate e and temperature T are those under
which the given labels are likeliest, and the confidence in a class is its posterior probability:
``P(true = c | x, y) ∝ P(c | x)^(1/T) · (1 - e if c = y else e / (C - 1))``. The temperature is needed: a network
trained on wrong labels is less certain than its accuracy justifies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ine_callback.scores import Floats, Scores
from ine_callback.utilities.optional import need
from ine_callback.utilities.terminal import SHOWN, as_text
from ine_callback.utilities.words import MISSING

if TYPE_CHECKING:
    from rich.table import Table

WHO = "InfluenceReport.suggest_labels"
FITTED_ROWS = 20_000  # enough for two numbers
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class LabelSuggestions:
    """Proposed labels, the surest first.

    Attributes:
        rows: Dataset indices [R].
        given: Their labels in the training set [R].
        proposed: The likeliest other label [R].
        confidence: Probability that the proposed label is the true one [R]; NaN where influence proposed it.
        noise: Estimated fraction of wrong labels in the training set; NaN without probabilities.
    """

    rows: Labels
    given: Labels
    proposed: Labels
    confidence: Floats
    noise: float

    def __len__(self) -> int:
        return len(self.rows)

    def corrected(self, labels: ArrayLike, confidence: float = 0.5) -> Labels:
        """A copy of the training set's labels [N] with all proposals of at least this confidence.

        Example:
            >>> from ine_callback.applications.relabel import LabelSuggestions
            >>> found = LabelSuggestions(*map(np.array, ([2, 0], [1, 1], [0, 0], [0.9, 0.2])), noise=0.1)
            >>> found.corrected([1, 1, 1])
            array([1, 1, 0])
        """
        out = np.asarray(labels).astype(np.int64)
        sure = self.confidence >= confidence
        out[self.rows[sure]] = self.proposed[sure]
        return out

    def to_pandas(self) -> Any:
        """A DataFrame with the columns row, given, proposed and confidence; needs the extra ``report``."""
        columns = {"row": self.rows, "given": self.given, "proposed": self.proposed, "confidence": self.confidence}
        return need("pandas", "LabelSuggestions.to_pandas").DataFrame(columns)

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        head = ("row", "given", "proposed", "confidence")
        noise = "" if np.isnan(self.noise) else f"noise found: {self.noise:.1%}"
        title = f"Suggested labels · {len(self)} rows"
        table = Table(*head, box=box.SIMPLE_HEAD, title=title, title_justify="left", caption=noise or None)
        columns = (self.rows, self.given, self.proposed, self.confidence)
        for row, given, proposed, sure in zip(*(column[:SHOWN] for column in columns), strict=True):
            table.add_row(str(row), str(given), str(proposed), MISSING if np.isnan(sure) else f"{sure:.2f}")
        return table

    def __str__(self) -> str:
        return as_text(self)


def suggest_labels(
    scores: Scores, labels: ArrayLike, probabilities: ArrayLike | None, rows: NDArray[np.int64]
) -> LabelSuggestions:
    """See :meth:`InfluenceReport.suggest_labels`; for the given rows."""
    given = _labels(labels, len(scores.observations))
    chosen = rows
    if probabilities is None:
        chosen = chosen[np.isfinite(scores.mu[chosen]).any(1)]  # other rows have no score
        proposed, confidence, noise = _harmed(scores, given, chosen), np.full(len(chosen), np.nan), float("nan")
    else:
        likely = _log_probabilities(probabilities, given)
        step = -(-len(scores.observations) // FITTED_ROWS)
        noise, temperature = _fit(likely[::step], given[::step])
        posterior = np.exp(_joint(likely[chosen], given[chosen], noise, temperature))
        posterior /= posterior.sum(1, keepdims=True)
        posterior[np.arange(len(chosen)), given[chosen]] = -1.0
        proposed, confidence = posterior.argmax(1), posterior.max(1, initial=-1.0)
    order = np.argsort(-confidence, kind="stable")
    return LabelSuggestions(chosen[order], given[chosen][order], proposed[order], confidence[order], noise)


def _joint(likely: Floats, given: Labels, noise: float, temperature: float) -> Floats:
    """Log of P(true = c, given | x) [n, C]."""
    scaled = likely / temperature
    scaled = scaled - scaled.max(1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(1, keepdims=True))
    channel = np.full_like(scaled, noise / (scaled.shape[1] - 1))
    channel[np.arange(len(given)), given] = 1.0 - noise
    out: Floats = scaled + np.log(channel.clip(1e-300))
    return out


def _fit(likely: Floats, given: Labels) -> tuple[float, float]:
    """Noise rate and temperature of greatest likelihood."""
    from scipy.optimize import minimize
    from scipy.special import expit, logsumexp

    def surprise(at: Floats) -> float:
        return -float(logsumexp(_joint(likely, given, float(expit(at[0])), float(np.exp(at[1]))), axis=1).mean())

    found = minimize(surprise, np.array([-2.0, 0.0]), method="Nelder-Mead", bounds=[(-12.0, 4.0), (-3.0, 3.0)])
    return float(expit(found.x[0])), float(np.exp(found.x[1]))


def _harmed(scores: Scores, given: Labels, rows: Labels) -> Labels:
    """The class, other than the given one, whose loss training on the row raises most."""
    names = [query.name for query in scores.queries]
    named = [(name.rpartition("/")[2], column) for column, name in enumerate(names) if "/" in name]
    classes = {int(text): column for text, column in named if text.isdecimal()}
    if len(classes) < 2 or len(classes) < len([text for text, _ in named if text.isdecimal()]):
        raise ValueError(
            f"{WHO}: without probabilities the report needs one query for each class, from one Query.per_class('val'); "
            f"its queries are {', '.join(map(repr, names[:20]))}"
        )
    mu = scores.mu[rows][:, list(classes.values())]
    numbers = np.array(list(classes), dtype=np.int64)
    mu = np.where((numbers == given[rows, None]) | np.isnan(mu), np.inf, mu)
    out: Labels = numbers[mu.argmin(1)]
    return out


def _labels(labels: ArrayLike, rows: int) -> Labels:
    given = np.asarray(labels)
    if given.shape != (rows,) or not np.issubdtype(given.dtype, np.integer) or (given < 0).any():
        raise ValueError(
            f"{WHO}: labels of shape {given.shape} and {given.dtype} are not one class, 0 or greater, for each of the "
            f"report's {rows} rows; pass the labels of the training set in its order"
        )
    return given.astype(np.int64)


def _log_probabilities(probabilities: ArrayLike, given: Labels) -> Floats:
    found = np.asarray(probabilities, dtype=np.float64)
    classes = int(given.max(initial=0)) + 1
    if found.ndim != 2 or len(found) != len(given) or found.shape[1] < max(classes, 2):
        raise ValueError(
            f"{WHO}: probabilities of shape {found.shape} do not fit {len(given)} rows with labels to {classes - 1}; "
            "pass those of all rows [N, C], because the noise rate is estimated from all"
        )
    if not (np.isfinite(found).all() and (found >= 0).all() and np.allclose(found.sum(1), 1.0, atol=1e-2)):
        raise ValueError(f"{WHO}: each row of probabilities must be >= 0 and add up to 1; pass a softmax, not logits")
    out: Floats = np.log(found.clip(1e-12))
    return out
