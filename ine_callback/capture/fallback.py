"""Per-sample gradients of parameters without a layer function: one backward pass a row. Exact, but slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.bare.no_row import KindsByParameter, gradients_without
from ine_callback.capture.row_losses import Scale, read_loss
from ine_callback.capture.verification import adds_up
from ine_callback.data.batches import cut
from ine_callback.utilities.isolation import isolated

Loss = Callable[[nn.Module, Any], Tensor]

COMPARED = (
    "a row's loss alone is not its part of the batch's loss: the loss compares rows with one another (a contrastive "
    "loss), or is no mean or sum over rows"
)
_DIFFERS_IN_TRAINING = (
    "the model treats rows otherwise in training than in evaluation mode, in which they are differentiated"
)
_EVALUATION_MODE = "single rows are recorded in evaluation mode: without dropout, with BatchNorm's running statistics"


def row_contributions(
    module: nn.Module,
    loss: Loss,
    batch: Any,
    rows: int,
    parameters: Sequence[nn.Parameter],
    scale: Scale,
    factor: Callable[[list[Tensor]], float] = lambda contributions: 1.0,
    of_no_row: KindsByParameter = MappingProxyType({}),
) -> list[Tensor]:
    """Every row's contribution to the gradient of the batch's loss, at the present weights.

    Runs in evaluation mode, so dropout is off and BatchNorm uses its running statistics: exact for models without them.

    Args:
        module: The model.
        loss: Loss of a batch.
        batch: The batch of ``rows`` rows.
        rows: b.
        parameters: The parameters to differentiate by.
        scale: How the batch's loss was scaled.
        factor: If the loss's form is not known: the factor for contributions to a mean over rows, given these.
        of_no_row: Of each parameter, the kinds of operations that belong to no row (a penalty on weights).

    Returns:
        For each parameter the contributions [b, *shape].
    """
    out = [p.new_zeros(rows, *p.shape, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    known = True
    with isolated(module):
        for k in range(rows):
            value = loss(module, cut(batch, torch.tensor([k]), rows))
            reading = read_loss(value, 1)
            if reading is not None and not bool(reading.terms):  # every token ignored: no contribution
                continue
            known &= reading is not None
            # in a mean over terms (tokens), a row with more terms contributes more
            value = value / scale.rows if reading is None else value * (reading.terms / scale.terms)
            for total, grad in zip(out, gradients_without(of_no_row, value, parameters), strict=True):
                if grad is not None:
                    total[k] = grad
    if not known:
        times = factor(out)
        out = out if times == 1.0 else [contributions * times for contributions in out]
    return out


def separable(module: nn.Module, loss: Loss, batch: Any, rows: int) -> bool:
    """Whether the loss of two rows is the mean or the sum of their own losses; False if that cannot be computed."""
    try:
        with isolated(module), torch.no_grad():
            one, other, both = (
                loss(module, cut(batch, torch.tensor(which), rows)).double() for which in ([0], [1], [0, 1])
            )
    except Exception:
        return False
    return any(bool(torch.isclose(both * times, one + other, rtol=1e-3, atol=1e-6)) for times in (1, 2))


@dataclass
class FallbackVerification:
    """Whether the rows' gradient contributions to some parameters add up to the batch's gradients.

    Args:
        module: The model.
        loss: Loss of a batch.
        batch: The batch.
        rows: b.
        parameters: By name.
        scale: How the batch's loss was scaled.
        gradients: The batch's gradients, of :class:`~.Verification`, without what belongs to no row.
        of_no_row: Of each parameter, the kinds of operations that belong to no row.
    """

    module: nn.Module
    loss: Loss
    batch: Any
    rows: int
    parameters: dict[str, nn.Parameter]
    scale: Scale
    gradients: Mapping[nn.Parameter, Tensor]
    of_no_row: KindsByParameter

    def is_sum(self, contributions: list[Tensor], default: bool) -> bool:
        """Whether the loss is a sum over rows, and no mean: whichever makes more parameters add up."""
        for truth in (self._by_name, self._in_evaluation_mode):
            pairs = list(zip(contributions, truth.values(), strict=True))
            mean, summed = (
                sum(adds_up(one * times, gradient) and bool(gradient.any()) for one, gradient in pairs)
                for times in (1.0, float(self.rows))
            )
            if mean or summed:
                return summed > mean
        return default

    def judge(self, contributions: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
        """Parameters whose contributions are wrong -> why, and modules whose single rows are approximate -> why."""
        wrong, approximate = {}, {}
        for name, gradient in self._by_name.items():
            if adds_up(contributions[name], gradient):
                continue
            if not adds_up(contributions[name], self._in_evaluation_mode[name]):
                wrong[name] = COMPARED
            elif any(_depends_on_mode(child) for child in self.module.modules()):
                approximate[name.rpartition(".")[0] or name] = _EVALUATION_MODE
            else:
                wrong[name] = _DIFFERS_IN_TRAINING
        return wrong, approximate

    @cached_property
    def _by_name(self) -> dict[str, Tensor]:
        return {name: self.gradients.get(p, torch.zeros_like(p)) for name, p in self.parameters.items()}

    @cached_property
    def _in_evaluation_mode(self) -> dict[str, Tensor]:
        """The gradients of the whole batch's loss, computed in evaluation mode as those of single rows are."""
        with isolated(self.module):
            value = self.loss(self.module, self.batch)
            reading = read_loss(value, self.rows)
            value = value * (self.rows / self.scale.rows if reading is None else reading.terms / self.scale.terms)
            grads = gradients_without(self.of_no_row, value, list(self.parameters.values()))
        return {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(self.parameters.items(), grads, strict=True)
        }


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module draws random numbers, or uses the batch's statistics, in training only."""
    rate = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0.0)
    random = isinstance(rate, float | int) and rate > 0
    return module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm))
