"""A sampler for the next training: each row as often as its weight says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from ine_callback.errors import InfluenceError


class InfluenceSampler(Sampler[int]):
    """Draws each row ``weight`` times an epoch on average, in random order; weights come from ``report.weights()``.

    A weight of 1 is exactly once an epoch and a weight of 0 never; 0.5 is every second epoch on average, 1.5 once or
    twice. The epoch has the same length every time (the sum of the weights), because the draws of an epoch are coupled
    (systematic sampling in random order). torch's ``WeightedRandomSampler`` draws independently, with replacement: of
    rows of weight 1 it leaves out 37 % in each epoch.

    The order depends on ``seed`` and the epoch alone. Lightning sets the epoch, also after resuming; elsewhere each
    pass counts as one. Lightning under DDP and Accelerate distribute its rows to the processes.

    Args:
        weights: One weight of at least 0 for each row of the dataset [N].
        seed: Seed of the draws; no global random state is used or changed.

    Attributes:
        epoch: Number of the next epoch.

    Raises:
        InfluenceError: For weights that are no vector of finite numbers >= 0, or that leave no row.

    Example:
        >>> from ine_callback import InfluenceSampler
        >>> from ine_callback.report import example_report
        >>> sampler = InfluenceSampler(example_report().weights(), seed=1)  # DataLoader(..., sampler=sampler)
        >>> rows = list(sampler)
        >>> len(rows), len(sampler), sorted(set(range(60)) - set(rows))
        (57, 57, [3, 17, 29])
    """

    def __init__(self, weights: NDArray[Any] | Tensor | Sequence[float], seed: int = 0) -> None:
        given = torch.as_tensor(weights, dtype=torch.float64)
        fine = given.dim() == 1 and bool(((given >= 0) & given.isfinite()).all())
        if not fine or round(float(given.sum())) < 1:
            raise InfluenceError(
                f"InfluenceSampler: weights of shape {tuple(given.shape)} must be finite numbers >= 0, one a row, "
                "that add up to at least 1; pass report.weights()."
            )
        self._length = round(float(given.sum()))
        self._weights = given * (self._length / given.sum())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next pass is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self._weights), generator=generator)
        ends = self._weights[order].cumsum(0)
        ends[-1] = self._length  # not a rounding error less
        start = torch.rand(1, generator=generator, dtype=torch.float64)
        passed = (ends + start).floor().long()  # ticks at whole numbers; a row is drawn for each tick in its stretch
        rows = order.repeat_interleave(passed.diff(prepend=torch.zeros(1, dtype=torch.int64)))
        return iter(rows[torch.randperm(len(rows), generator=generator)].tolist())
