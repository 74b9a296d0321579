"""Per-row gradients of parameters that no layer function covers, one backward pass a row: exact, slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.row_losses import Scale, read_loss
from ine_callback.capture.verification import agree
from ine_callback.data.batches import cut
from ine_callback.utilities.isolation import isolated

Loss = Callable[[nn.Module, Any], Tensor]

COMPARED = (
    "a row's loss alone is not its part of the batch's loss: the loss compares rows with one another (a contrastive "
    "loss), or is no mean or sum over rows"
)
_OTHERWISE = "training mode does something else with a row than evaluation mode, in which each is differentiated"
_QUIETLY = "single rows are recorded in evaluation mode: without dropout, with BatchNorm's running statistics"


def row_contributions(
    module: nn.Module,
    loss: Loss,
    batch: Any,
    rows: int,
    parameters: Sequence[nn.Parameter],
    scale: Scale,
    factor: Callable[[list[Tensor]], float] = lambda shares: 1.0,
) -> list[Tensor]:
    """Every row's share of the gradient of the batch's loss, at the present weights.

    Runs in evaluation mode, so dropout is off and BatchNorm uses its running statistics: exact for models without them.

    Args:
        module: The model.
        loss: Loss of a batch.
        batch: The batch of ``rows`` rows.
        rows: b.
        parameters: The parameters to differentiate by.
        scale: How the batch's loss was scaled.
        factor: Where the loss's form is not known: what the shares of a mean over rows must be multiplied with.

    Returns:
        For each parameter the shares [b, *shape].
    """
    out = [p.new_zeros(rows, *p.shape, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    known = True
    with isolated(module):
        for k in range(rows):
            value = loss(module, cut(batch, torch.tensor([k]), rows))
            reading = read_loss(value, 1)
            if reading is not None and not bool(reading.terms):  # every token ignored: a mean over nothing, no share
                continue
            known &= reading is not None
            # a row with more terms (tokens) than others has the larger share of a mean over terms
            value = value / scale.rows if reading is None else value * (reading.terms / scale.terms)
            for total, grad in zip(out, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
                if grad is not None:
                    total[k] = grad.to_dense() if grad.is_sparse else grad
    if not known:
        times = factor(out)
        out = out if times == 1.0 else [shares * times for shares in out]
    return out


def separable(module: nn.Module, loss: Loss, batch: Any, rows: int) -> bool:
    """Whether the loss of two rows is the mean or the sum of each one's own; False where it cannot be told."""
    try:
        with isolated(module), torch.no_grad():
            one, other, both = (
                loss(module, cut(batch, torch.tensor(which), rows)).double() for which in ([0], [1], [0, 1])
            )
    except Exception:
        return False
    return any(bool(torch.isclose(both * times, one + other, rtol=1e-3, atol=1e-6)) for times in (1, 2))


@dataclass
class Sums:
    """Whether the rows' shares of some parameters add up to what the batch brought them.

    Args:
        module: The model.
        loss: Loss of a batch.
        batch: The batch.
        rows: b.
        parameters: By name.
        scale: How the batch's loss was scaled.
        brought: What the batch brought the parameters.
    """

    module: nn.Module
    loss: Loss
    batch: Any
    rows: int
    parameters: dict[str, nn.Parameter]
    scale: Scale
    brought: Mapping[nn.Parameter, Tensor]

    def factor(self, shares: list[Tensor], before: float) -> float:
        """1 where the shares of a mean over rows add up, b where those of a sum do; whichever does for more of them."""
        for sought in (self._gradients, self._whole):
            pairs = list(zip(shares, sought.values(), strict=True))
            fits = {
                times: sum(agree(one * times, gradient) and bool(gradient.any()) for one, gradient in pairs)
                for times in (1.0, float(self.rows))
            }
            if any(fits.values()):
                return max(fits, key=lambda times: fits[times])
        return before

    def judge(self, shares: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
        """Names of parameters whose shares are wrong, and of modules whose single rows are approximate, with why."""
        wrong, approximate = {}, {}
        for name, gradient in self._gradients.items():
            if agree(shares[name], gradient):
                continue
            if not agree(shares[name], self._whole[name]):
                wrong[name] = COMPARED
            elif any(_depends_on_mode(child) for child in self.module.modules()):
                approximate[name.rpartition(".")[0] or name] = _QUIETLY
            else:
                wrong[name] = _OTHERWISE
        return wrong, approximate

    @cached_property
    def _gradients(self) -> dict[str, Tensor]:
        return {name: self.brought.get(p, torch.zeros_like(p)) for name, p in self.parameters.items()}

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """The gradients of the whole batch's loss, made as those of single rows are."""
        with isolated(self.module):
            value = self.loss(self.module, self.batch)
            reading = read_loss(value, self.rows)
            value = value * (self.rows / self.scale.rows if reading is None else reading.terms / self.scale.terms)
            found = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if grad is None else grad.to_dense() if grad.is_sparse else grad
            for (name, p), grad in zip(self.parameters.items(), found, strict=True)
        }


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether it draws random numbers in training, or takes the batch's statistics then."""
    rate = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0.0)
    random = isinstance(rate, float | int) and rate > 0
    return module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm))
