"""Scores of rows, gathered from passes over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.influence.directions import Directions
from ine_callback.methods.influence.label_parts import LabelParts
from ine_callback.methods.row_gradients import RowGradients
from ine_callback.scores import Floats, TokenScores


class RowScores:
    """Scores of rows by layer, as the passes bring their gradients.

    Args:
        directions: The queries' solutions.
        queries: Number of queries Q.
        rows: Dataset indices of the R scored rows.
        count: Number of training rows N.
        positions: Whether to keep the positions' parts.

    Attributes:
        rows: Dataset indices [R].
        by_layer: Scores [R, L, Q], one layer for each block of the space.
        leverages: Largest leverage of each row [R], with ``rescale``.
        gradient: Sum of the rows' gradients [P], and of their squared norms.
        labels: The labels of the tokens of all rows, one after the other, where tokens are scored by label.
    """

    def __init__(self, directions: Directions, queries: int, rows: Sequence[int], count: int, positions: bool) -> None:
        self._space, self._directions, self._count = directions.space, directions, count
        self.rows = np.asarray(list(rows), dtype=np.int64)
        self._place = {int(row): k for k, row in enumerate(self.rows)}
        self.by_layer = np.full((len(self.rows), len(self._space.blocks), queries), np.nan)
        self.leverages = np.full(len(self.rows), np.nan)
        self.gradient, self.squares = torch.zeros(self._space.size), 0.0
        self._positions = positions
        self._tokens: dict[int, Floats] = {}
        self._labels: dict[int, Floats] = {}

    def take(self, rows: Tensor, gradients: RowGradients) -> None:
        """Scores a batch of rows by their gradients."""
        with torch.no_grad():
            own = gradients.only(self._space.blocks).rescaled(torch.full_like(gradients.scale, len(rows)))
            self._add(rows, self._products(own), own)
            if self._positions:
                self._add_tokens(rows, own)

    def take_rescaled(
        self, rows: Tensor, labels: Sequence[RowGradients], own: RowGradients, weights: Tensor, leverages: Tensor
    ) -> None:
        """The same with the gradients under all labels, times their weights [b, C]."""
        with torch.no_grad():
            found = self._products(own)
            for one, weight in zip(labels, weights.unbind(1), strict=True):
                found = found + self._products(one) * weight.to(found)[:, None, None]
            self._add(rows, found, own)
        self.leverages[self._at(rows)] = leverages.cpu().numpy()

    def _products(self, gradients: RowGradients) -> Tensor:
        """Inner products [b, L, Q] with the solutions."""
        return torch.stack([self._directions.products(gradients, block) for block in self._space.blocks], 1)

    def _add(self, rows: Tensor, products: Tensor, own: RowGradients) -> None:
        self.by_layer[self._at(rows)] = (products / self._count).double().cpu().numpy()
        ones = torch.ones_like(own.scale)[:, None]
        total = self._space.join(own.weighted_sums(ones))[0]
        self.gradient = self.gradient.to(total) + total
        self.squares += float(own.squared_norms().sum())

    def _add_tokens(self, rows: Tensor, own: RowGradients) -> None:
        counts = Counter(one.positions or 1 for block in own for one in own.grad_samples(block))
        del counts[1]
        if not counts:
            raise InfluenceError("IF: per_token='position', but no layer's gradients have positions; leave it out.")
        positions = counts.most_common(1)[0][0]
        whole = {block: self._directions.whole(block) for block in self._space.blocks}
        parts = own.position_products(whole, positions) / self._count
        for place, part in zip(self._at(rows), parts.double().cpu().numpy(), strict=True):
            self._tokens[place] = part

    def take_labels(self, found: LabelParts) -> None:
        """Keeps the parts of a row's tokens by label."""
        place = self._place[found.row]
        self._tokens[place], self._labels[place] = found.parts, found.labels

    def tokens(self) -> TokenScores | None:
        """The tokens' parts, which add up to the rows' scores; None where they were not asked for."""
        if not self._tokens:
            return None
        each = [self._tokens[k] for k in range(len(self.rows))]
        return TokenScores(np.cumsum([0, *map(len, each)]), np.concatenate(each))

    @property
    def labels(self) -> Floats | None:
        return np.concatenate([self._labels[k] for k in range(len(self.rows))]) if self._labels else None

    def _at(self, rows: Tensor) -> list[int]:
        return [self._place[row] for row in rows.tolist()]
