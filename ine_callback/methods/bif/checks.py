"""The checks of a run of chains: each names the knob to turn where it fails."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ine_callback.methods.bif.scores import SIZE, SURVIVES
from ine_callback.scores import Check, Floats
from ine_callback.stats.chains import drift, effective_size, split_rhat

RHAT, DRIFT, BIAS, INFLATION, STRENGTH, BALANCE, LOST, NOISE = 1.1, 0.5, 0.25, 0.5, 0.1, 0.98, 0.5, 0.5


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


def noise_fraction(scores: Floats, noise: Floats) -> float:
    """Share of the scores' variance over rows that is Monte-Carlo noise, median over queries; NaN if not known.

    Args:
        scores: [R, Q].
        noise: Standard errors of the rows' distances from their mean [R, Q]: what all rows share ranks none.
    """
    variance = scores.var(0)
    if len(scores) < 3 or not np.isfinite(noise).all() or not (variance > 0).any():
        return math.nan
    return float(np.median((noise**2).mean(0)[variance > 0] / variance[variance > 0]))


def checks(
    draws: int, scores: Floats, noise: Floats, survives: float, lost: float, loss: Floats, facts: Facts
) -> list[Check]:
    """All checks.

    Args:
        draws: Draws asked for.
        scores: [R, Q].
        noise: See :func:`noise_fraction`.
        survives: Share of the covariance that is no trend.
        lost: Share of what was learned that the draws have lost.
        loss: The chains' trace [C, T].
        facts: What the posterior tells.
    """
    complete = loss.shape[1] == draws
    rhat, size, slope = split_rhat(loss), effective_size(loss), drift(loss)
    positive = float((scores > 0).mean())
    balance = max(positive, 1 - positive)
    random = noise_fraction(scores, noise)
    bias, bent, strength = facts
    stronger = "raise n_beta or lower localization: else the score is hardly more than a product of gradients"
    slower = "raise burn_in, or step_size where the chains are stable"
    return [
        Check("draws", loss.shape[1], f"{draws}", complete, "lower step_size or raise localization"),
        Check("split R-hat of the loss", rhat, f"below {RHAT}", rhat < RHAT, slower),
        Check("effective draws of the loss", size, f"above {SIZE:g}", size > SIZE, "raise draws or thinning"),
        Check("drift of the loss", slope, f"within ±{DRIFT}", not abs(slope) > DRIFT, slower),
        Check("covariance left without trend", survives, f"above {SURVIVES}", not survives < SURVIVES, slower),
        Check("step-size bias", bent, f"below {INFLATION}", bent < INFLATION, "lower step_size"),
        Check("minibatch bias", bias, f"below {BIAS}", not bias > BIAS, "raise batch_size or lower step_size"),
        Check("data against pull", strength, f"above {STRENGTH}", strength > STRENGTH, stronger),
        Check(
            "share of scores with one sign",
            balance,
            f"below {BALANCE}",
            scores.size < 20 or balance < BALANCE,
            "look for drift; raise localization, so that chains do not all climb together",
        ),
        Check("learning lost at the draws", lost, f"below {LOST}", not lost > LOST, "raise localization"),
        Check("noise share of the scores", random, f"below {NOISE}", not random > NOISE, "raise draws or chains"),
    ]
