"""The checks of a run of chains. A check that fails names the option to change."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ine_callback.methods.bif.scores import MIN_EFFECTIVE_DRAWS, MIN_UNTRENDED
from ine_callback.scores import Check, Floats
from ine_callback.stats.chains import drift, effective_size, split_rhat

MAX_RHAT = 1.1
MAX_DRIFT = 0.5
MAX_MINIBATCH_BIAS = 0.25
MAX_STEP_SIZE_BIAS = 0.5
MIN_DATA_STRENGTH = 0.1
MAX_ONE_SIGN = 0.98
MAX_LEARNING_LOST = 0.5
MAX_NOISE = 0.5
MIN_SIGNS = 20  # scores; of fewer, all may have one sign by chance


class PosteriorFacts(NamedTuple):
    """What the posterior says about the chains.

    Attributes:
        minibatch_bias: See :func:`ine_callback.stats.chains.minibatch_bias`.
        step_size_bias: See :meth:`.posterior.LocalPosterior.step_size_bias`.
        data_strength: See :attr:`.posterior.LocalPosterior.data_strength`.
    """

    minibatch_bias: float
    step_size_bias: float
    data_strength: float


def noise_fraction(scores: Floats, noise: Floats) -> float:
    """Fraction of the scores' variance over rows that is Monte-Carlo noise, median over queries; NaN if unknown.

    Args:
        scores: [R, Q].
        noise: Standard errors of the rows' differences from their mean [R, Q]; one that
            all rows have in common changes no rank.
    """
    variance = scores.var(0)
    if len(scores) < 3 or not np.isfinite(noise).all() or not (variance > 0).any():
        return math.nan
    return float(np.median((noise**2).mean(0)[variance > 0] / variance[variance > 0]))


def checks(
    draws: int, scores: Floats, noise: Floats, untrended: float, lost: float, loss: Floats, facts: PosteriorFacts
) -> list[Check]:
    """All checks.

    Args:
        draws: Draws that the settings ask for.
        scores: [R, Q].
        noise: See :func:`noise_fraction`.
        untrended: Fraction of the covariance that is left when both series lose their linear trend.
        lost: Fraction of what the model has learned that the draws have lost.
        loss: Mean loss of the rows at every draw [C, T].
        facts: What the posterior says about the chains.
    """
    taken = loss.shape[1]
    rhat, size, slope = split_rhat(loss), effective_size(loss), drift(loss)
    positive = float((scores > 0).mean())
    one_sign = max(positive, 1 - positive)
    random = noise_fraction(scores, noise)
    minibatch, step_size, strength = facts
    stronger = "raise n_beta or lower localization: else the score is hardly more than a product of gradients"
    longer = "raise burn_in, or step_size where the chains are stable"
    together = "check for drift; raise localization, so that not all losses climb together"
    few_signs = scores.size < MIN_SIGNS
    # written so that a value that is NaN fails only where it is a reason to doubt
    return [
        Check("draws", taken, f"{draws}", taken == draws, "lower step_size or raise localization"),
        Check("split R-hat of the loss", rhat, f"below {MAX_RHAT}", rhat < MAX_RHAT, longer),
        Check(
            "effective draws of the loss",
            size,
            f"above {MIN_EFFECTIVE_DRAWS:g}",
            size > MIN_EFFECTIVE_DRAWS,
            "raise draws or thinning",
        ),
        Check("drift of the loss", slope, f"within ±{MAX_DRIFT}", not abs(slope) > MAX_DRIFT, longer),
        Check(
            "covariance left without trend",
            untrended,
            f"above {MIN_UNTRENDED}",
            not untrended < MIN_UNTRENDED,
            longer,
        ),
        Check(
            "step-size bias",
            step_size,
            f"below {MAX_STEP_SIZE_BIAS}",
            step_size < MAX_STEP_SIZE_BIAS,
            "lower step_size",
        ),
        Check(
            "minibatch bias",
            minibatch,
            f"below {MAX_MINIBATCH_BIAS}",
            not minibatch > MAX_MINIBATCH_BIAS,
            "raise batch_size or lower step_size",
        ),
        Check(
            "data against localization",
            strength,
            f"above {MIN_DATA_STRENGTH}",
            strength > MIN_DATA_STRENGTH,
            stronger,
        ),
        Check(
            "fraction of scores with one sign",
            one_sign,
            f"below {MAX_ONE_SIGN}",
            few_signs or one_sign < MAX_ONE_SIGN,
            together,
        ),
        Check(
            "learning lost at the draws",
            lost,
            f"below {MAX_LEARNING_LOST}",
            not lost > MAX_LEARNING_LOST,
            "raise localization",
        ),
        Check(
            "noise fraction of the scores",
            random,
            f"below {MAX_NOISE}",
            not random > MAX_NOISE,
            "raise draws or chains",
        ),
    ]
