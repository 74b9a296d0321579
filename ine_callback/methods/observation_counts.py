"""A fit without f-INE: how often each row was trained on, and no score."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ine_callback.methods.base import Method
from ine_callback.scores import QueryInfo, Scores


class ObservationCounts(Method):
    """Counts the optimizer steps that each row was in; stands for f-INE where only fit-end methods run.

    Example:
        >>> counts = ObservationCounts()
        >>> counts.start(3, (), torch.device("cpu"))
        >>> counts.update(torch.tensor([0, 2]), torch.zeros(2, 0), rate=0.1)
        >>> counts.compute().observations.tolist()
        [1, 0, 1]
    """

    needs_signals = False

    def start(
        self,
        rows: int,
        queries: tuple[QueryInfo, ...],
        device: torch.device,
        random_weights: bool = False,
        contrasts: int = 0,
    ) -> None:
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(
        self,
        rows: Tensor,
        signals: Tensor,
        rate: float,
        unit: Tensor | None = None,
        contrasts: Tensor | None = None,
        halves: Tensor | None = None,
    ) -> None:
        self._counts.index_add_(0, rows, torch.ones_like(rows))

    def compute(self) -> Scores:
        """Returns scores of no query: observations alone."""
        rows = len(self._counts)
        none = np.zeros((rows, 0))
        return Scores(
            queries=(),
            mu=none,
            se=none,
            p=none,
            q=none,
            t=none,
            p_t=none,
            null_sd=none,
            observations=self._counts.cpu().numpy().astype(np.int64),
            mean_loss=np.full(rows, np.nan),
            null_mu=np.zeros((0, 0)),
            null_ks_p=np.zeros(0),
        )

    def grow(self, rows: int) -> None:
        more = max(0, rows - len(self._counts))
        self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])

    def state_dict(self) -> dict[str, Any]:
        return {"observations": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = state["observations"].to(self._counts, copy=True)
