"""A small ViT, most of whose parameters belong to no layer with a layer function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.oracle import TELLS

# Where torch does not tell what activation checkpointing has saved, uses that read what is saved are left out.
LEFT_OUT = () if TELLS else ("gamma", "attention.in_proj_weight", "attention.out_proj.weight")

needs_saved = pytest.mark.skipif(not TELLS, reason="this torch does not tell what activation checkpointing saved")


def parameter(*shape: int) -> nn.Parameter:
    """Drawn anew, of some size."""
    return nn.Parameter(0.5 * torch.randn(shape))


class Vision(nn.Module):
    """Class token, position table, attention of torch, layer scale: [b, 5, 4] -> [b, classes]."""

    def __init__(self, batch_first: bool = True, classes: int = 3) -> None:
        super().__init__()
        self.embed, self.batch_first = nn.Linear(4, 4), batch_first
        self.token, self.place, self.gamma = parameter(1, 1, 4), parameter(1, 6, 4), parameter(4)
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.head = nn.Linear(4, classes)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.place
        z = self.norm(x)
        z = z if self.batch_first else z.transpose(0, 1)
        z = self.attention(z, z, z, need_weights=False)[0]
        z = z if self.batch_first else z.transpose(0, 1)
        return self.head((x + self.gamma * z)[:, 0])
