"""Finds, before any chain runs, the largest stable step size and how far draws will be from the trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ine_callback.methods.bif.bif import BIF
from ine_callback.methods.bif.posterior import LocalPosterior
from ine_callback.methods.bif.row_losses import RowLoss
from ine_callback.methods.bif.run import prepared


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        bif: The settings with step size, localization and n_beta filled in.
        step_size: ε, the largest stable one.
        localization: γ as given, or as chosen.
        distance: Root mean square distance of draws from the trained weights, by the quadratic posterior.
        weights_norm: Norm of the trained weights.
        inflation: Relative inflation of the variance by the step size in the steepest direction.
    """

    bif: BIF
    step_size: float
    localization: float
    distance: float
    weights_norm: float
    inflation: float

    def __str__(self) -> str:
        fraction = self.distance / self.weights_norm if self.weights_norm else float("inf")
        return (
            f"step_size={self.step_size:.3g}, localization={self.localization:.3g}, n_beta={self.bif.n_beta:.3g}: "
            f"the distance of draws from the trained weights is {self.distance:.3g}, {fraction:.0%} of their norm; the "
            f"step size inflates no variance by more than {self.inflation:.0%}"
        )


def calibrate(
    module: nn.Module,
    train: Any,
    bif: BIF | None = None,
    loss_fn: RowLoss | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Calibration:
    """The largest step size at which chains are stable for the settings' n_beta and localization, by a short search.

    This is the calibration that the chains make themselves. The module is left bit for bit as it was.

    Args:
        module: The trained model.
        train: All training rows as one batch.
        bif: Settings; their ``step_size`` is ignored, their ``localization`` is used.
        loss_fn: Losses of single rows, see :func:`~ine_callback.bif_scores`.
        context: Surrounds every evaluation, e.g. with autocast.

    Raises:
        InfluenceError: If the losses of single rows are not available.
        RuntimeError: If no step size is small enough.

    Example:
        >>> import torch
        >>> x, y = torch.randn(40, 3), torch.randn(40)
        >>> squared = lambda module, batch: (module(batch[0])[:, 0] - batch[1]).square()
        >>> found = calibrate(torch.nn.Linear(3, 1), (x, y), BIF(localization=10.0), squared)
        >>> found.localization, found.step_size > 0, found.bif.step_size == found.step_size
        (10.0, True, True)
    """
    bif = bif or BIF()
    with prepared(module, train, bif, loss_fn, context, "calibrate") as (flat, rows, losses):
        posterior = LocalPosterior(flat, losses, rows, bif)
        sampler = posterior.sampler(posterior.calibrate())
        return Calibration(
            replace(bif, step_size=sampler.step_size, localization=posterior.localization, n_beta=posterior.n_beta),
            sampler.step_size,
            posterior.localization,
            posterior.quadratic.spread**0.5,
            float(flat.weights.norm()),
            posterior.step_size_bias(sampler),
        )
