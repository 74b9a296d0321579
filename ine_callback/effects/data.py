"""The table that an effect is estimated from: columns, treatment, outcome and graph, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ine_callback.effects.graph import OWNER, CausalGraph, Tiers, causal_graph
from ine_callback.effects.outcome import Outcome
from ine_callback.errors import InfluenceError
from ine_callback.utilities.validate import listed

Floats = NDArray[np.float64]
Columns = Mapping[str, ArrayLike] | Any  # a data frame, too


class EffectData:
    """Columns of N rows, and how they cause each other.

    Args:
        columns: Names to arrays [N], or [N, d] of a node with several numbers; a data frame does too. Text is taken as
            categories.
        treatment: Name of the column of the treatment, 0 or 1 (False or True) in each row.
        outcome: Name of the column of the outcome, numbers; or an :class:`Outcome` of a training.
        graph: ``"C -> A; A -> M -> Y"``, or a ``networkx.DiGraph``.
        tiers: In its place: groups of names in causal order, each caused by all of the earlier ones.
        hidden: Nodes of the graph that nobody measured.

    Raises:
        InfluenceError: On a cycle, unknown names, a treatment of other values, missing values or columns of unequal
            lengths.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a = rng.integers(0, 2, 100)
        >>> data = EffectData({"A": a, "Y": a + rng.normal(size=100)}, "A", "Y", "A -> Y")
        >>> data
        EffectData(100 rows, treatment 'A' (56 treated), outcome 'Y')
    """

    def __init__(
        self,
        columns: Columns,
        treatment: str,
        outcome: str | Outcome,
        graph: str | Any | None = None,
        tiers: Tiers | None = None,
        hidden: Iterable[str] = (),
    ) -> None:
        hidden = frozenset(hidden)
        given = {str(name): columns[name] for name in columns}
        if isinstance(outcome, Outcome):
            if outcome.name in given:
                raise InfluenceError(f"{OWNER}: the outcome {outcome.name!r} is a column, too; give it another name=.")
            given[outcome.name], outcome = outcome.values, outcome.name
        self.graph: CausalGraph = causal_graph(graph, treatment, outcome, tiers, hidden)
        self.tiers = None if tiers is None else tuple(map(tuple, tiers))
        missing = sorted(set(self.graph.graph) - hidden - set(given))
        if missing:
            raise InfluenceError(
                f"{OWNER}: the graph has {', '.join(map(repr, missing))}, and the columns are {sorted(given)}; add the "
                "column, or name the node in hidden=."
            )
        if measured := sorted({treatment, outcome} & hidden):
            raise InfluenceError(f"{OWNER}: {measured[0]!r} is treatment or outcome and cannot be hidden.")
        self._columns = {name: numbers(name, given[name]) for name in self.graph.graph if name not in hidden}
        lengths = {name: len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise InfluenceError(f"{OWNER}: columns have unequal lengths: {lengths}; give each a value for each row.")
        for name, column in self._columns.items():
            bad = np.flatnonzero(~np.isfinite(column).all(1))
            if bad.size:
                raise InfluenceError(
                    f"{OWNER}: column {name!r} has no finite number in row {listed(bad)}; drop these rows or impute "
                    "them, which is an assumption of yours."
                )
        self.treated = self._binary(treatment)
        self.outcome = self._single(outcome)

    def __len__(self) -> int:
        return len(self.treated)

    def __repr__(self) -> str:
        a, y = self.graph.treatment, self.graph.outcome
        return f"EffectData({len(self)} rows, treatment {a!r} ({int(self.treated.sum())} treated), outcome {y!r})"

    def matrix(self, names: Iterable[str]) -> Floats:
        """Columns side by side [N, d], in the order of their names; [N, 0] of none."""
        parts = [self._columns[name] for name in sorted(names)]
        return np.concatenate(parts, 1) if parts else np.zeros((len(self), 0))

    def single(self, name: str) -> bool:
        """Whether a node is one number a row."""
        return bool(self._columns[name].shape[1] == 1)

    def _single(self, name: str) -> Floats:
        if not self.single(name):
            raise InfluenceError(
                f"{OWNER}: outcome {name!r} has {self._columns[name].shape[1]} numbers a row; give one, such as one "
                "class's 0 or 1."
            )
        return self._columns[name][:, 0]

    def _binary(self, name: str) -> NDArray[np.bool_]:
        column = self._columns[name]
        values = np.unique(column)
        if column.shape[1] != 1 or values.tolist() != [0.0, 1.0]:
            some = ", ".join(f"{value:g}" for value in values[:4]) + (", …" if values.size > 4 else "")
            raise InfluenceError(
                f"{OWNER}: treatment {name!r} must be 0 or 1 with both there, and its values are {some}; make it a "
                'comparison, such as columns["A"] = source == "web".'
            )
        treated: NDArray[np.bool_] = column[:, 0] == 1
        return treated


def numbers(name: str, column: Any) -> Floats:
    """A column as numbers [N, d]; categories as 0 and 1 for each but the first.

    Raises:
        InfluenceError: If it holds something else.
    """
    found = np.asarray(column)
    if found.dtype.kind == "O" and not any(isinstance(value, str) for value in found.flat):
        found = found.astype(np.float64)  # None becomes NaN
    if found.dtype.kind in "OUS" and found.ndim == 1:  # text, also of digits
        if not all(isinstance(value, (str, bytes)) for value in found):
            raise InfluenceError(f"{OWNER}: column {name!r} has text and missing values; drop these rows.")
        levels, codes = np.unique(found.astype(str), return_inverse=True)
        found = np.eye(len(levels))[codes][:, 1:]
    if found.dtype.kind not in "fiub" or found.ndim not in (1, 2):
        raise InfluenceError(
            f"{OWNER}: column {name!r} is of type {found.dtype} and shape {found.shape}; give numbers or text, [rows] "
            "or [rows, numbers]."
        )
    return found.astype(np.float64).reshape(len(found), -1)
