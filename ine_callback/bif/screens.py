"""The checks of a run of chains: each names the knob to turn where it fails."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ine_callback.bif.scores import SIZE, SURVIVES, Screen, noise_share
from ine_callback.scores import Floats
from ine_callback.stats.chains import drift, effective_size, split_rhat

RHAT, DRIFT, BIAS, INFLATION, STRENGTH, BALANCE, SECOND_ORDER, NOISE = 1.1, 0.5, 0.25, 0.5, 0.1, 0.98, 0.5, 0.5


class Facts(NamedTuple):
    """What the posterior tells of the chains.

    Attributes:
        bias: See :func:`ine_callback.stats.chains.minibatch_bias`.
        inflation: Of the variance by the step size, see :meth:`.posterior.LocalPosterior.inflation`.
        strength: Of the data, see :attr:`.posterior.LocalPosterior.strength`.
    """

    bias: float
    inflation: float
    strength: float


def second_order_share(second_order: Floats, se: Floats, laplace: Floats) -> float:
    """How much of what tells rows apart is second order: its variance over rows beside that of the Laplace term.

    Removing a row moves the weights to first order by its gradient; to second order it widens the posterior where the
    row's loss bends. Only the former is what retraining shows.

    Args:
        second_order: Covariances of the losses' even parts [R, Q], or of their rows' terms (then R is the first axis).
        se: Their Monte-Carlo standard errors around the mean row [R, Q], whose squares are taken off.
        laplace: The Laplace term [R, Q].

    Returns:
        The median over queries; NaN where there is no mirrored pair.

    Example:
        >>> bent, straight = np.array([[0.0], [2.0]]), np.array([[0.0], [1.0]])
        >>> second_order_share(bent, np.zeros((2, 1)), straight)
        0.8
    """
    if len(second_order) < 2 or not np.isfinite(second_order).all() or not np.isfinite(se).all():
        return math.nan
    bent = np.maximum(second_order.var(0) - (se**2).mean(0), 0)
    whole = bent + laplace.var(0)
    return float(np.median(bent[whole > 0] / whole[whole > 0])) if (whole > 0).any() else math.nan


def screens(
    draws: int, scores: Floats, se: Floats, second_order: float, survives: float, loss: Floats, facts: Facts
) -> list[Screen]:
    """All checks.

    Args:
        draws: Draws asked for.
        scores: [R, Q].
        se: Their standard errors [R, Q].
        second_order: See :func:`second_order_share`.
        survives: Share of the covariance that is no trend.
        loss: The chains' trace [C, T].
        facts: What the posterior tells.
    """
    complete = loss.shape[1] == draws
    rhat, size, slope = split_rhat(loss), effective_size(loss), drift(loss)
    positive = float((scores > 0).mean())
    balance = max(positive, 1 - positive)
    noise = float(np.nanmedian(noise_share(scores, se))) if np.isfinite(se).any() and len(scores) > 2 else math.nan
    bias, bent, strength = facts
    stronger = "raise n_beta or lower localization: else the score is hardly more than a product of gradients"
    slower = "raise burn_in, or step_size where the chains are stable"
    return [
        Screen("draws", loss.shape[1], f"{draws}", complete, "lower step_size or raise localization"),
        Screen("split R-hat of the loss", rhat, f"below {RHAT}", rhat < RHAT, slower),
        Screen("effective draws of the loss", size, f"above {SIZE:g}", size > SIZE, "raise draws or thinning"),
        Screen("drift of the loss", slope, f"within ±{DRIFT}", not abs(slope) > DRIFT, slower),
        Screen("covariance left without trend", survives, f"above {SURVIVES}", not survives < SURVIVES, slower),
        Screen("step-size bias", bent, f"below {INFLATION}", bent < INFLATION, "lower step_size"),
        Screen("minibatch bias", bias, f"below {BIAS}", not bias > BIAS, "raise batch_size or lower step_size"),
        Screen("data against pull", strength, f"above {STRENGTH}", strength > STRENGTH, stronger),
        Screen(
            "share of scores with one sign",
            balance,
            f"below {BALANCE}",
            scores.size < 20 or balance < BALANCE,
            "look for drift; raise localization, so that chains do not all climb together",
        ),
        Screen(
            "second-order share",
            second_order,
            f"below {SECOND_ORDER}",
            not second_order > SECOND_ORDER,
            "raise localization: what tells rows apart is how their losses bend, not where they pull the weights",
        ),
        Screen("noise share of the scores", noise, f"below {NOISE}", not noise > NOISE, "raise draws or chains"),
    ]
