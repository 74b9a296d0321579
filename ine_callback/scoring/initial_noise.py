"""The unit of signals: the standard deviation that random initial weights leave in a query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture import Block
from ine_callback.distributed.sharding import whole
from ine_callback.utilities.options import InitialWeights


class InitialNoise:
    """How far random initial weights move a query: the scale of training randomness, which one run cannot show.

    The entries of each parameter are taken as independent, with the variance that they have at the start of the run
    (zero for constants such as a norm's ones or zeroed biases). Such noise in the weights changes a query with the
    direction U by ``unit = ||sigma * U||`` (one standard deviation).

    Args:
        module: The model at the start of the run.
        weights: ``random`` if another run would draw new ones; ``fixed`` (fine-tuning) if not: every entry then has
            sigma = 1, and the scale has no meaning of its own.
    """

    def __init__(self, module: nn.Module, weights: InitialWeights) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad and p.numel() and p.is_floating_point()]
        found = {p: whole(p.detach()).float().var(unbiased=False) for p in parameters}
        spread = bool(torch.stack([v > 0 for v in found.values()]).any()) if found else False
        self.random = weights == "random" and spread
        self.note = ""
        if weights == "random" and not spread:
            self.note = "the initial weights are all alike: only the order of the rows counts as training randomness"
        self._variances = found if self.random else {}
        self._names = {name: p for name, p in module.named_parameters() if p in self._variances}

    def state_dict(self) -> dict[str, Any]:
        """The variances at the start, by the parameters' names."""
        return {name: self._variances[p] for name, p in self._names.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, since a resumed run starts from trained weights."""
        for name, variance in state.items():
            if name in self._names:
                self._variances[self._names[name]] = variance.to(self._variances[self._names[name]])

    def of_weight(self, block: Block) -> Tensor | float:
        """sigma^2 of the block's first parameter (a layer's weight), for all entries of the block."""
        return self._variances.get(block.parameters[0], 0.0) if self.random else 1.0

    def variance(self, block: Block, u: Tensor) -> Tensor:
        """Variance [Q] of <u, noise> for u [Q, *layout]."""
        sigma2 = [self._variances.get(p, torch.zeros((), device=u.device)) for p in block.parameters]
        squared = u.float().square()
        if not self.random:
            return squared.flatten(1).sum(1)
        if len(sigma2) == 1:
            return squared.flatten(1).sum(1) * sigma2[0]
        return squared[..., :-1].flatten(1).sum(1) * sigma2[0] + squared[..., -1].flatten(1).sum(1) * sigma2[1]
