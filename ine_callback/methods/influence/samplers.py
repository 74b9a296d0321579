r"""Which rows make up a minibatch of the Fisher, and with which weights.

``uniform`` and ``curvature`` are unbiased: their weights are the inverse of a row's chance to be drawn. ``curvature``
draws row i with probability ``q_i = t_i / (2 sum t) + 1 / (2N)``, where ``t_i`` is the trace of the row's own part of
the Fisher: most of the curvature is in few rows.

``logit``, ``distance`` and ``topk`` are those of arXiv 2510.26776, which choose representative rows: for each class,
rows with probability proportional to what the model gives the class; for each of as many clusters of the last layer's
inputs, rows drawn near the centre, or the nearest ones. They weigh rows equally, so they are biased.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from ine_callback.errors import InfluenceError

SamplerName = Literal["uniform", "curvature", "logit", "distance", "topk"]


class Sampler(Protocol):
    """Draws minibatches."""

    def draw(self, rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Dataset indices [m] of about ``size`` rows out of ``rows``, and their weights [m] in the sum."""


class Uniform:
    """Every row alike, with replacement."""

    def draw(self, rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`Sampler`."""
        return torch.randint(rows, (size,), generator=generator), torch.full((size,), 1 / size)


class Curvature:
    """Rows by their part of the Fisher's trace, unbiased.

    Args:
        traces: Of every row [N].

    Example:
        >>> rows, weights = Curvature(torch.tensor([1.0, 3.0])).draw(2, 4000, torch.Generator().manual_seed(0))
        >>> round(float((rows == 1).double().mean()), 1), weights[rows == 1][0]  # 5/8; 1 / (2 * 5/8 * 4000)
        (0.6, tensor(0.0002))
    """

    def __init__(self, traces: Tensor) -> None:
        self.chances = traces / (2 * traces.sum().clamp_min(1e-300)) + 1 / (2 * len(traces))

    def draw(self, rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`Sampler`."""
        drawn = torch.multinomial(self.chances, size, replacement=True, generator=generator)
        return drawn, 1 / (rows * size * self.chances[drawn])


class Weighted:
    """The same number of rows for each class or cluster, without replacement in it.

    Args:
        weights: Weight of each row for each class or cluster [N, K].
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights.clamp_min(1e-12)  # a class with fewer probable rows takes others

    def draw(self, rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`Sampler`."""
        each = _each(size, self.weights.shape[1], rows)
        drawn = torch.multinomial(self.weights.T, each, generator=generator).flatten()
        return drawn, torch.full((len(drawn),), 1 / len(drawn))


class Nearest:
    """The rows nearest to each cluster's centre: always the same ones.

    Args:
        distances: Of each row from each centre [N, K].
    """

    def __init__(self, distances: Tensor) -> None:
        self.order = distances.argsort(0)

    def draw(self, rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`Sampler`."""
        drawn = self.order[: _each(size, self.order.shape[1], rows)].T.flatten()
        return drawn, torch.full((len(drawn),), 1 / len(drawn))


def _each(size: int, groups: int, rows: int) -> int:
    each = max(1, size // groups)
    if each > rows:
        raise InfluenceError(f"IF: batch_size={size} asks for {each} rows of a class; there are {rows} rows.")
    return each


def distances_to_centres(features: Tensor, clusters: int, seed: int) -> Tensor:
    """Distances [N, K] of features [N, D] from the centres of K clusters (k-means++)."""
    x = features.double().numpy()
    centres, _ = kmeans2(x, clusters, minit="++", seed=np.random.default_rng(seed))
    return torch.cdist(features.double(), torch.from_numpy(centres))
