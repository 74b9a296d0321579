"""Gradients of rows as a method that runs on a trained model gets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample


class RowGradients:
    """Gradients of b rows' own losses, block by block, as the factors that the passes left; formed on demand.

    A row's own loss is the mean over its terms, as in the report's ``mean_loss``: without constants that scale the
    loss, and whatever the other rows of its batch weigh.

    Args:
        grad_samples: Each block's per-sample gradients as factors; several where a batch used it several times.
        scale: What turns their rows into gradients of the rows' own losses [b].
        terms: Likelihood terms of the mean that the batch's loss is: ``terms * sum s s^T`` of the factors' rows s is
            the batch's Fisher.
    """

    def __init__(self, grad_samples: dict[Block, list[GradSample]], scale: Tensor, terms: Tensor | float) -> None:
        self._grad_samples, self._scale, self.terms = grad_samples, scale, terms

    def __iter__(self) -> Iterator[Block]:
        return iter(self._grad_samples)

    def grad_samples(self, block: Block) -> list[GradSample]:
        """A block's factors: their sum times :attr:`scale`, row by row, are the rows' gradients."""
        return self._grad_samples[block]

    @property
    def scale(self) -> Tensor:
        """What the rows of the factors are multiplied with [b]."""
        return self._scale

    def formed(self, block: Block) -> Tensor:
        """The gradients [b, *layout] of a block."""
        first, *rest = (grad_sample.wide().gradient(slice(None)) for grad_sample in self._grad_samples[block])
        total = sum(rest, first)
        return total * self._scale.to(total.dtype).view(-1, *[1] * (total.dim() - 1))

    def products(self, directions: dict[Block, Tensor]) -> Tensor:
        """Inner products [b, Q] with directions, each [Q, *layout]."""
        parts = [
            grad_sample.wide().signals(directions[block])
            for block, grad_samples in self._grad_samples.items()
            if block in directions
            for grad_sample in grad_samples
        ]
        return torch.stack(parts).sum(0) * self._scale[:, None]

    def position_products(self, directions: dict[Block, Tensor], positions: int) -> Tensor:
        """The parts of :meth:`products` by position [b, P, Q].

        Blocks of other numbers of positions, and those that have lost theirs, count the same at each.
        """
        total: Tensor | None = None
        for block, grad_samples in self._grad_samples.items():
            for one in grad_samples if block in directions else ():
                found = one.wide().position_signals(directions[block]) if one.positions == positions else None
                if found is None:
                    whole = one.wide().signals(directions[block]) / positions
                    found = whole[:, None].expand(-1, positions, -1)
                total = found if total is None else total + found
        assert total is not None
        return total * self._scale[:, None, None]

    def weighted_sums(self, weights: Tensor) -> dict[Block, Tensor]:
        """Sums of the rows' gradients, each [Q, *layout], with Q weights for each row [b, Q]."""
        scaled = weights * self._scale[:, None]
        return {
            block: torch.stack([one.wide().weighted_sums(scaled.to(one.wide().dtype)) for one in grad_samples]).sum(0)
            for block, grad_samples in self._grad_samples.items()
        }

    def only(self, blocks: Sequence[Block]) -> RowGradients:
        """The gradients of some blocks."""
        chosen = {block: self._grad_samples[block] for block in blocks if block in self._grad_samples}
        return RowGradients(chosen, self._scale, self.terms)

    def rescaled(self, scale: Tensor) -> RowGradients:
        """The same factors, times other numbers [b]."""
        return RowGradients(self._grad_samples, scale, self.terms)

    def squared_norms(self) -> Tensor:
        """Squared norms [b] of the gradients over all blocks."""
        parts = [
            grad_samples[0].wide().squared_norms() * self._scale**2
            if len(grad_samples) == 1
            else self.formed(block).flatten(1).square().sum(1)
            for block, grad_samples in self._grad_samples.items()
        ]
        return torch.stack(parts).sum(0)
