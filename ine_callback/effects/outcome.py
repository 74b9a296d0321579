"""Outcomes that a training gives each of its rows: loss in the run, influence score, anything of the trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ine_callback.effects.formulas import Floats
from ine_callback.errors import InfluenceError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Outcome:
    """A number for each training row, by dataset index; an :class:`EffectData` takes it as ``outcome``.

    Attributes:
        name: Of the node in the graph.
        values: [N].
    """

    name: str
    values: Floats

    @classmethod
    def loss(cls, report: Any, name: str = "loss") -> Outcome:
        """Each row's training loss, averaged over the run.

        Args:
            report: Of a recorded run.
            name: Of the node.

        Example:
            >>> from ine_callback.report import example_report
            >>> Outcome.loss(example_report()).values.shape
            (60,)
        """
        return cls(name, np.asarray(report.scores.mean_loss, dtype=np.float64))

    @classmethod
    def score(cls, report: Any, query: str | None = None, name: str = "score") -> Outcome:
        """Each row's influence score μ on a query; above 0: training on the row helps.

        Args:
            report: Of a recorded run.
            query: Name of its query, the first by default.
            name: Of the node.

        Raises:
            InfluenceError: If the report has no such query.

        Example:
            >>> from ine_callback.report import example_report
            >>> Outcome.score(example_report(), "val").values[5] > 0
            np.True_
        """
        names = [each.name for each in report.scores.queries]
        if not names or query not in (None, *names):
            raise InfluenceError(
                f"Outcome.score: no query {query!r} in the report, which has {names}; name one of these."
            )
        column = 0 if query is None else names.index(query)
        return cls(name, np.asarray(report.scores.mu, dtype=np.float64)[:, column])

    @classmethod
    def prediction(
        cls,
        module: nn.Module,
        batches: Iterable[Any],
        value: Callable[[nn.Module, Any], Tensor],
        name: str = "prediction",
    ) -> Outcome:
        """A number of each row by the trained model, in evaluation mode; the module is left as it was.

        Args:
            module: Trained.
            batches: Of all rows in the order of their indices, such as a loader without ``shuffle``.
            value: From module and batch to numbers [b], such as a margin, a probability or a loss.
            name: Of the node.

        Raises:
            InfluenceError: If ``value`` gives no number for each row, or a loader shuffles.

        Example:
            >>> import torch
            >>> module = torch.nn.Linear(2, 1)
            >>> found = Outcome.prediction(module, torch.eye(2).split(1), lambda module, batch: module(batch)[:, 0])
            >>> found.values.shape
            (2,)
        """
        import torch
        from torch.utils.data import RandomSampler

        from ine_callback.utilities.isolation import isolated

        if isinstance(getattr(batches, "sampler", None), RandomSampler):
            raise InfluenceError("Outcome.prediction: the loader shuffles, so rows lose their place; shuffle=False.")
        parts = []
        with isolated(module), torch.no_grad():
            for batch in batches:
                part = value(module, batch)
                if part.dim() != 1:
                    raise InfluenceError(
                        f"Outcome.prediction: value gives the shape {tuple(part.shape)}; return one number a row."
                    )
                parts.append(part.detach().cpu().double().numpy())
        return cls(name, np.concatenate(parts))
