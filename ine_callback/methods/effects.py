"""Causal effects at the end of a fit. What they are is in :mod:`ine_callback.effects`, and needs no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ine_callback.effects.data import EffectData
from ine_callback.effects.estimands import ATE, Estimand
from ine_callback.effects.estimation import check_question, estimate
from ine_callback.effects.files import read_columns
from ine_callback.effects.graph import CausalGraph, causal_graph
from ine_callback.effects.nuisances import Nuisances
from ine_callback.effects.outcome import Outcome
from ine_callback.effects.parsing import nuisances
from ine_callback.effects.path_effects import paths
from ine_callback.effects.reported import NAME, attribution
from ine_callback.errors import InfluenceError
from ine_callback.methods.fit_end import FitEndMethod, Need
from ine_callback.scores import Attribution, Stage

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext

WHO = "CausalEffects"
LOSS, SCORE, PREDICTION = "loss", "score", "prediction"  # nodes of the graph
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class CausalEffects(FitEndMethod):
    """Effects of a column of the training rows on what the training made of them, other columns held alike.

    The result is in ``report.effects``. Estimates whose rows show a lack of positivity are there too, marked as failed
    checks. Rows without the outcome, such as never observed ones, are left out and counted in a note.

    Args:
        treatment: Name of a column, 0 or 1 in each row.
        columns: A .csv or .parquet file with one line for each training row, in the order of the data set; names to
            values of the rows; or a function of a training batch that gives names to values [b].
        graph: How the columns and the outcome cause each other, such as ``"digit -> web; digit -> loss; web -> loss"``.
            The outcome's node has the name ``loss``, ``score`` or ``prediction``.
        tiers: In its place: groups of names in causal order.
        outcome: ``"loss"``: the row's mean training loss in the run; ``"score"``: its f-INE score on a query; or a
            function of the trained module and a batch that gives numbers [b], a ``prediction``.
        query: Name of the query of ``outcome="score"``, the first by default.
        estimands: What is asked, see :mod:`ine_callback.effects`.
        tau: Paths of this stability or more are looked for as well, where tiers are given; None: none.
        posterior: ``"exact"`` or ``"flow"``, of the paths.
        hidden: Nodes of the graph that nobody measured.
        nuisances: ``"spline"``, ``"linear"``, ``"network"``, (regressor, classifier), or
            :class:`~ine_callback.effects.Networks`.
        folds: Of cross-fitting.
        seed: Deals the rows into folds.
        at: When it runs: numbers of finished epochs, or the ``"end"`` of training.

    Raises:
        InfluenceError: For a question that the graph cannot answer, and for invalid settings, before training.

    Example:
        >>> from ine_callback import CausalEffects
        >>> CausalEffects("web", {"web": [0, 1]}, "web -> loss; loss -> web")
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: EffectData: the graph has the cycle web -> loss -> web; ...
    """

    treatment: str
    columns: str | Columns | Callable[[Any], Mapping[str, Any]]
    graph: str | None = None
    tiers: Sequence[Sequence[str]] | None = None
    outcome: Literal["loss", "score"] | Callable[[Any, Any], torch.Tensor] = "loss"
    query: str | None = None
    estimands: Sequence[Estimand] = (ATE(),)
    tau: float | None = None
    posterior: Literal["exact", "flow"] = "exact"
    hidden: Sequence[str] = ()
    nuisances: str | tuple[Any, Any] | Nuisances = "spline"
    folds: int = 5
    seed: int = 0
    at: Sequence[Stage] = ("end",)

    name = NAME  # without a type, so no setting of the dataclass

    @property
    def needs(self) -> Sequence[Need]:  # type: ignore[override]
        """Training rows where functions of batches are asked, whole weights for predictions."""
        reads = callable(self.columns) or callable(self.outcome)
        found: list[Need] = ["training_rows"] if reads else []
        return [*found, "whole_weights"] if callable(self.outcome) else found

    def __post_init__(self) -> None:
        if self.outcome not in (LOSS, SCORE) and not callable(self.outcome):
            raise InfluenceError(
                f"{WHO}: outcome={self.outcome!r}; choose 'loss' or 'score', or give a function of module and batch."
            )
        if self.query is not None and self.outcome != SCORE:
            raise InfluenceError(f"{WHO}: query={self.query!r} belongs to outcome='score'.")
        if not callable(self.outcome) and list(self.at) != ["end"]:
            raise InfluenceError(
                f"{WHO}: at={list(self.at)}, and the run's {self.outcome} is known at its end; leave at= out, or give "
                "a function of module and batch as the outcome."
            )
        if not self.estimands and self.tau is None:
            raise InfluenceError(f"{WHO}: no estimands and no tau; ask something, such as estimands=[ATE()].")
        if self.tau is not None and self.tiers is None:
            raise InfluenceError(
                f"{WHO}: tau={self.tau:g} looks for paths under tiers; give tiers= in place of graph=."
            )
        graph = self._graph()
        for estimand in self.estimands:
            check_question(graph, estimand)
        nuisances(self.nuisances)
        if isinstance(self.columns, str) and not Path(self.columns).is_file():
            raise InfluenceError(f"{WHO}: columns={self.columns!r} is no file; give a .csv or .parquet file.")
        if isinstance(self.columns, Mapping):
            self._check_names(self.columns, graph)

    @property
    def _node(self) -> str:
        return self.outcome if isinstance(self.outcome, str) else PREDICTION

    def _graph(self) -> CausalGraph:
        return causal_graph(self.graph, self.treatment, self._node, self.tiers, self.hidden)

    def _check_names(self, columns: Mapping[str, Any], graph: CausalGraph) -> None:
        missing = sorted(set(graph.graph) - set(columns) - set(self.hidden) - {self._node})
        if missing:
            raise InfluenceError(
                f"{WHO}: the graph has {', '.join(map(repr, missing))}, and the columns are {sorted(columns)}; add the "
                "column, or name the node in hidden=."
            )

    def settings(self) -> dict[str, Any]:
        return {}  # the effects themselves are there, with all that they rest on

    def run(self, context: FitContext) -> Attribution:
        """Estimates the effects with the outcome of the present weights."""
        columns = self._columns(context)
        self._check_names(columns, self._graph())
        outcome = self._outcome(context)
        lengths = {len(column) for column in columns.values()} | {len(outcome)}
        if len(lengths) > 1 or len(outcome) != context.rows:
            raise InfluenceError(
                f"{WHO}: columns have {sorted({len(each) for each in columns.values()})} rows, and the training set "
                f"has {context.rows}; give each column a value for each training row, in the order of the data set."
            )
        kept = np.flatnonzero(np.isfinite(outcome))
        if not kept.size:
            raise InfluenceError(f"{WHO}: no row has a {self._node}; the losses of single rows could not be read.")
        data = EffectData(
            {name: np.asarray(column)[kept] for name, column in columns.items()}, self.treatment,
            Outcome(self._node, outcome[kept]), self.graph, self.tiers, self.hidden,
        )  # fmt: skip
        models, options = nuisances(self.nuisances), {"folds": self.folds, "seed": self.seed}
        found: list[Any] = [
            estimate(data, each, models, **options, refuse=False, track=context.progress) for each in self.estimands
        ]
        if self.tau is not None:
            found.append(paths(data, self.tau, models, **options, posterior=self.posterior, track=context.progress))
        left = context.rows - len(kept)
        notes = [f"effects: {left:,} rows without a {self._node} are left out"] if left else []
        return attribution(found, kept, notes)

    def _columns(self, context: FitContext) -> dict[str, Any]:
        if isinstance(self.columns, str):
            return read_columns(Path(self.columns))
        if isinstance(self.columns, Mapping):
            return {str(name): np.asarray(column) for name, column in self.columns.items()}
        parts: dict[str, list[Any]] = {}
        for batch in context.in_order("columns"):
            for name, values in self.columns(batch).items():
                values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
                parts.setdefault(str(name), []).append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _outcome(self, context: FitContext) -> Any:
        if callable(self.outcome):
            with context.precision():
                return Outcome.prediction(context.module, context.in_order("predictions"), self.outcome).values
        if context.scores is None:
            raise InfluenceError(f"{WHO}: this run has no {self._node} of single rows; add FINE() to methods.")
        if self.outcome == LOSS:
            return np.asarray(context.scores.mean_loss, dtype=np.float64)
        names = [query.name for query in context.scores.queries]
        if not names or self.query not in (None, *names):
            raise InfluenceError(f"{WHO}: no query {self.query!r} in this run, which has {names}; name one of these.")
        return np.asarray(context.scores.mu, dtype=np.float64)[:, names.index(self.query) if self.query else 0]
