"""Everything that is stored for every row of the data set: the methods' state, observations, losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ine_callback.capture.row_losses import RowLosses
from ine_callback.capture.row_margins import RowMargins
from ine_callback.data.row_ids import RowCheck
from ine_callback.errors import InfluenceError
from ine_callback.methods import Method
from ine_callback.recording.observations import Observations
from ine_callback.scores import QueryInfo, Scores


class RowAccumulators:
    """Updates the rows' accumulators with the observations of a step; grows where the number of rows is unknown.

    Args:
        owner: Class named in messages.
        rows: Number of rows, or None where it is unknown.
        queries: The queries, in column order.
        methods: What accumulates.
        device: Where the accumulators live.
        random_weights: Whether another run would draw its initial weights anew.
        contrasts: Contrasts of every signal.

    Attributes:
        check: Which row ids are valid.
        queries: The queries, in column order.
    """

    def __init__(
        self,
        owner: str,
        rows: int | None,
        queries: tuple[QueryInfo, ...],
        methods: Sequence[Method],
        device: torch.device,
        random_weights: bool,
        contrasts: int,
    ) -> None:
        self._owner, self._rows, self.queries, self._methods = owner, rows, queries, methods
        self.check, self._size, self._contrasts = RowCheck(owner, rows), rows or 0, contrasts
        self._losses, self._margins = RowLosses(self._size, device), RowMargins(self._size, device)
        for method in methods:
            method.start(self._size, queries, device, random_weights, contrasts)

    def update(self, observations: Observations, rate: float, units: Tensor, known: int) -> None:
        """Takes a step's observations, at its rate and in units [b, Q]; ``known`` rows exist."""
        self.check.count = known
        if known > self._size:
            self._grow(max(known, 2 * self._size))
        self._losses.add(observations.rows, observations.losses)
        self._margins.add(observations.rows, observations.margins)
        signals, contrasts, halves = observations.signals.tensor_split([1, 1 + self._contrasts], -1)
        for method in self._methods:
            method.update(observations.rows, signals[..., 0], rate, units, contrasts, halves)

    def _grow(self, rows: int) -> None:
        self._size = rows
        self._losses.grow(rows)
        self._margins.grow(rows)
        for method in self._methods:
            method.grow(rows)

    def summed_loss(self) -> Tensor:
        """Training loss summed over all observations so far, a scalar on the device; 0 where losses are unknown."""
        return self._losses.total()

    def scores(self) -> Scores:
        """The scores so far of the rows that exist."""
        scores = replace(self._methods[0].compute(), mean_loss=self._losses.mean(), margins=self._margins.means())
        return scores.first(self.check.count)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types: 28 bytes a row and query, 92 a row, and the null (docs/howto/long-runs.md)."""
        return {
            "settings": self._settings(),
            "rows": self.check.count,
            "size": self._size,
            "losses": self._losses.state_dict(),
            "margins": self._margins.state_dict(),
            "methods": [method.state_dict() for method in self._methods],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned.

        Raises:
            InfluenceError: If it was recorded with other queries or methods, or with more rows.
        """
        saved, here = state["settings"], self._settings()
        if saved != here or (self._rows is not None and state["rows"] > self._rows):
            raise InfluenceError(
                f"{self._owner}: the checkpoint holds {saved} and {state['rows']} rows, this run has {here} and "
                f"{self._rows or 'any number of'} rows; resume with the same data and settings."
            )
        for method, of_method in zip(self._methods, state["methods"], strict=True):
            method.load_state_dict(of_method)  # first: it may refuse, and then nothing has changed
        self.check.count = max(self.check.count, state["rows"])
        self._losses.load_state_dict(state["losses"])
        if "margins" in state:  # checkpoints of 0.1 have none
            self._margins.load_state_dict(state["margins"])
        self._grow(max(self._size, state["size"]))

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run."""
        kinds = [type(method).__name__ for method in self._methods]
        return {"queries": [query.name for query in self.queries], "methods": kinds}
