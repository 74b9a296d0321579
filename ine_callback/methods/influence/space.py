"""The captured parameters of a model as one vector, for solvers that know of no layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ine_callback.capture import Block


class ParameterSpace:
    """Blocks of parameters side by side: vectors [Q, P] and, block by block, [Q, *layout].

    Args:
        blocks: In the order in which they are joined.

    Attributes:
        blocks: The blocks.
        size: Number of parameters P.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self._sizes = [int(torch.Size(block.layout).numel()) for block in self.blocks]
        self.size = sum(self._sizes)

    def join(self, parts: Mapping[Block, Tensor]) -> Tensor:
        """Vectors [Q, P] from their parts [Q, *layout]."""
        return torch.cat([parts[block].flatten(1) for block in self.blocks], 1)

    def split(self, vectors: Tensor) -> dict[Block, Tensor]:
        """The parts [Q, *layout] of vectors [Q, P]."""
        parts = vectors.split(self._sizes, 1)
        return {b: part.reshape(-1, *b.layout) for b, part in zip(self.blocks, parts, strict=True)}

    def spread(self, values: Mapping[Block, float]) -> Tensor:
        """One number for each block, as a vector [P] in float64."""
        return torch.cat(
            [torch.full((n,), values[b], dtype=torch.float64) for b, n in zip(self.blocks, self._sizes, strict=True)]
        )
