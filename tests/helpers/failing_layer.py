"""A layer whose function fails from some call on, and a small network around any layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ine_callback.capture import register_layer


class Failing(nn.Module):
    """Its function fails from some call on."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.factor, self.left = nn.Parameter(torch.rand(4) + 0.5), after

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@register_layer(Failing)
def _failing(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, Tensor]:
    assert isinstance(module, Failing)
    module.left -= 1
    if module.left < 0:
        raise ZeroDivisionError("mine")
    return {"factor": activations * output_grads}


def around(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer(), nn.Linear(4, 3))
