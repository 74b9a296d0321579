"""The queries' solutions, whole or of low rank: what the rows' gradients are multiplied with.

A query of a large model is as large as the model. Grosse et al. 2023 keep the first 32 singular vectors of each layer's
part, with a correlation of .995 with the whole. ``x ~ U V`` with U [O, r] and V [r, I], and a row's product is
``sum_p <delta_p U, V a_p>``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ine_callback.capture import Block
from ine_callback.methods.influence.space import ParameterSpace
from ine_callback.methods.row_gradients import RowGradients

CHUNK = 1 << 26  # numbers of the products with directions of low rank that are formed at once


class Directions:
    """Solutions of queries, gathered chunk by chunk.

    Args:
        space: The parameters.
        rank: Singular vectors of each layer's part; None: all of it.
    """

    def __init__(self, space: ParameterSpace, rank: int | None) -> None:
        self.space, self._rank = space, rank
        self._whole: dict[Block, list[Tensor]] = {block: [] for block in space.blocks}
        self._low: dict[Block, list[tuple[Tensor, Tensor]]] = {}

    def add(self, x: Tensor) -> None:
        """Adds the solutions [q, P] of further queries."""
        for block, part in self.space.split(x).items():
            if self._rank is None or part.dim() < 4 or self._rank >= min(part.shape[2:]):
                self._whole[block].append(part)
                continue
            left, values, right = torch.linalg.svd(part.double(), full_matrices=False)
            scaled = (left * values[..., None, :])[..., : self._rank]
            self._low.setdefault(block, []).append((scaled.to(part), right[..., : self._rank, :].to(part)))

    def whole(self, block: Block) -> Tensor:
        """The directions [Q, *layout] of a block."""
        if block in self._low:
            return torch.cat([left @ right for left, right in self._low[block]])
        return torch.cat(self._whole[block])

    def products(self, gradients: RowGradients, block: Block) -> Tensor:
        """Inner products [b, Q] with the rows' gradients of a block."""
        if block not in self._low:
            return gradients.only([block]).products({block: self.whole(block)})
        parts = []
        for left, right in self._low[block]:
            for one in gradients.grad_samples(block):
                together = max(1, CHUNK // max(1, one.rows * (one.positions or 1) * left.shape[-1]))
                pairs = zip(left.split(together), right.split(together), strict=True)
                parts.append(torch.cat([one.wide().low_rank_signals(a, b) for a, b in pairs], 1))
        uses = len(gradients.grad_samples(block))
        chunks = [torch.stack(parts[k : k + uses]).sum(0) for k in range(0, len(parts), uses)]
        total: Tensor = torch.cat(chunks, 1) * gradients.scale[:, None]
        return total
