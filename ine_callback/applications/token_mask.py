"""Which tokens to suppress: those that promote the unwanted texts most, document by document (IF-Guide, 2506.01790).

    tau    quantile of all tokens' scores
    n, f   number and summed score of a document's tokens above tau, each scaled to [0, 1] over the documents
    R      2 n f / (n + f), their harmonic mean: documents with many such tokens, and with high ones

Documents are taken by descending R. Each of their tokens above tau is taken with its neighbours, until the budget is
used up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from ine_callback.errors import InfluenceError
from ine_callback.scores import Attribution, Floats

LABELS = "token labels"  # array of an attribution: each token's id, NaN for one that has no loss
UNKNOWN = -1  # label of a token whose id is not known
_META = b"ine_callback.token_mask"


@dataclass(frozen=True)
class TokenMask:
    """Tokens of a data set.

    Attributes:
        rows: Dataset index of each chosen token's row [M], ascending.
        positions: Its place in the row [M].
        labels: Its id [M], which :meth:`of` compares; -1 where it is not known.
        tokens: Number of tokens that they were chosen among.
        settings: How.
    """

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def share(self) -> float:
        """Of all tokens."""
        return len(self) / self.tokens

    def lines(self, most: int) -> list[str]:
        """How many tokens there are, and where, in the ``most`` rows that have most of them."""
        rows, counts = np.unique(self.rows, return_counts=True)
        lines = [f"{len(self):,} of {self.tokens:,} tokens ({self.share:.2%}) in {len(rows):,} rows"]
        for at in (-counts).argsort(kind="stable")[:most]:
            places = self.positions[self.rows == rows[at]]
            where = f"{', '.join(map(str, places[:12]))}{' …' if len(places) > 12 else ''}"
            lines.append(f"row {rows[at]:>8d}: {counts[at]} at {where}")
        return lines

    def of(self, row: int, labels: ArrayLike) -> NDArray[np.bool_]:
        """Which tokens of a row are chosen [T].

        Args:
            row: Dataset index.
            labels: The row's labels [T], as they are now.

        Raises:
            InfluenceError: If the chosen tokens are other ones now: another data set, order or tokeniser.
        """
        now = np.asarray(labels)
        chosen = slice(*np.searchsorted(self.rows, (row, row + 1)))
        at, expected = self.positions[chosen], self.labels[chosen]
        if at.size and at.max() >= len(now):
            raise InfluenceError(
                f"TokenMask: row {row} has {len(now)} tokens, and token {at.max()} of it is to be suppressed; give the "
                "tokenised rows that were scored, in their order."
            )
        if (wrong := np.flatnonzero((expected != UNKNOWN) & (now[at] != expected))).size:
            k = wrong[0]
            raise InfluenceError(
                f"TokenMask: token {at[k]} of row {row} is {now[at[k]]} now and was {expected[k]} when it was scored; "
                "give the same rows in the same order, by the same tokeniser."
            )
        mask = np.zeros(len(now), dtype=bool)
        mask[at] = True
        return mask

    def save(self, path: str | Path) -> None:
        """Writes a Parquet file with one line for each chosen token."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        meta = {_META: json.dumps({"tokens": self.tokens, "settings": dict(self.settings)})}
        columns = {"row": self.rows, "position": self.positions, "label": self.labels}
        pq.write_table(pa.table(columns).replace_schema_metadata(meta), path)

    @classmethod
    def load(cls, path: str | Path) -> TokenMask:
        """Reads what :meth:`save` wrote.

        Raises:
            InfluenceError: If the file is another one.
        """
        table = pq.read_table(path)
        if _META not in (table.schema.metadata or {}):
            raise InfluenceError(f"TokenMask: {path} was not written by TokenMask.save().")
        columns = (table[name].to_numpy().astype(np.int64) for name in ("row", "position", "label"))
        return cls(*columns, **json.loads(table.schema.metadata[_META]))


def token_mask(
    found: Attribution, query: str | None = None, quantile: float = 0.99, window: int = 1, budget: float = 0.02
) -> TokenMask:
    """Chooses the tokens to suppress.

    Args:
        found: Scores with tokens, such as :class:`ine_callback.TokenInfluence`'s.
        query: One of its queries, the first by default.
        quantile: Tokens with a score above this quantile are chosen, with their neighbours.
        window: How many neighbours on each side.
        budget: Most chosen tokens, as a share of all tokens.

    Raises:
        InfluenceError: If there are no scores of tokens, a setting is impossible, or all scores are equal.

    Example:
        >>> import numpy as np
        >>> from ine_callback.scores import Attribution, QueryInfo, TokenScores
        >>> tokens = TokenScores(np.array([0, 4, 8]), np.array([[0.0, 9, 0, 0, 1, 0, 0, 2]]).T)
        >>> question = (QueryInfo("toxic", "loss", "?"),)
        >>> found = Attribution("IF", np.arange(2), question, np.array([[9.0], [3.0]]), tokens=tokens)
        >>> mask = token_mask(found, quantile=0.7, window=0, budget=0.4)
        >>> mask.rows, mask.positions
        (array([0, 1, 1]), array([1, 0, 3]))
    """
    if found.tokens is None:
        raise InfluenceError(
            f"token_mask: {found.method} has no scores of tokens; use TokenInfluence(...) or IF(per_token='label')."
        )
    if not 0 < quantile < 1 or not 0 < budget <= 1 or window < 0:
        raise InfluenceError(
            f"token_mask: quantile={quantile}, window={window}, budget={budget}; quantile must be between 0 and 1, "
            "window at least 0, and budget above 0 and at most 1."
        )
    scores, offsets = found.tokens.scores[:, found.column(query)], found.tokens.offsets
    labels = found.arrays.get(LABELS)
    counted = np.isfinite(scores) if labels is None else ~np.isnan(labels)
    if not counted.any() or np.ptp(scores[counted]) == 0:
        raise InfluenceError("token_mask: all scores are equal, so no token stands out; is the query's gradient 0?")
    document = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    above = counted & (scores > np.quantile(scores[counted], quantile))
    chosen = _chosen(scores, above, counted, document, window, int(budget * counted.sum()))
    row, at = found.rows[document[chosen]], np.flatnonzero(chosen) - offsets[document[chosen]]
    order = np.lexsort((at, row))
    known = np.full(len(row), UNKNOWN) if labels is None else labels[chosen].astype(np.int64)
    settings: dict[str, Any] = {"method": found.method, "query": found.queries[found.column(query)].name}
    settings |= {"quantile": quantile, "window": window, "budget": budget}
    return TokenMask(row[order], at[order], known[order], int(counted.sum()), settings)


def _chosen(
    scores: Floats,
    above: NDArray[np.bool_],
    counted: NDArray[np.bool_],
    document: NDArray[np.int64],
    window: int,
    most: int,
) -> NDArray[np.bool_]:
    """The tokens taken [T], at most ``most``."""
    number = np.asarray(np.bincount(document, above), dtype=np.float64)
    total = np.asarray(np.bincount(document, np.where(above, scores, 0.0)), dtype=np.float64)
    n, f = _scaled(number), _scaled(total)
    with np.errstate(invalid="ignore"):
        rank = np.nan_to_num(2 * n * f / (n + f))
    around = _around(above, document, window) & counted
    order = np.lexsort((np.arange(len(rank)), -rank))
    order = order[number[order] > 0]
    used = np.cumsum(np.bincount(document, around, minlength=len(rank))[order])
    whole = int(np.searchsorted(used, most, side="right"))
    chosen: NDArray[np.bool_] = around & np.isin(document, order[:whole])
    if whole < len(order):  # the first document that does not fit, as far as it does
        left = most - (int(used[whole - 1]) if whole else 0)
        for token in np.flatnonzero(above & (document == order[whole])):
            first, last = max(0, int(token) - window), int(token) + window + 1
            new = first + np.flatnonzero(counted[first:last] & (document[first:last] == order[whole]))
            new = new[~chosen[new]]
            if len(new) > left:
                break
            chosen[new] = True
            left -= len(new)
    return chosen


def _around(above: NDArray[np.bool_], document: NDArray[np.int64], window: int) -> NDArray[np.bool_]:
    """Tokens at most ``window`` from one above the threshold, in the same document."""
    near = above.copy()
    for k in range(1, window + 1):
        same = document[k:] == document[:-k]
        near[k:] |= above[:-k] & same
        near[:-k] |= above[k:] & same
    return near


def _scaled(x: Floats) -> Floats:
    scaled: Floats = (x - x.min()) / max(float(np.ptp(x)), 1e-300)
    return scaled
