"""BIF, the Bayesian influence function (arXiv 2509.26544): as a method in a fit. The chains run in ``bif/run.py``.

    posterior   p(w) ∝ exp(−n_beta L(w) − (γ/2) ‖w − w*‖²) around the trained weights w*, L the training's own loss
    score       + Cov_p(ℓ_i(w), φ(w))         > 0: training on row i lowers the query φ (helpful)

The paper's BIF is −Cov; the sign is changed so that it means the same as f-INE's. To first order the score is the
damped influence function: Cov = gᵢᵀ (n_beta H + γ)⁻¹ ∇φ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ine_callback.methods.bif.scores import NAME
from ine_callback.methods.bif.settings import BIFSettings
from ine_callback.methods.bif.split_chains import check_divisible
from ine_callback.methods.fit_end import FitEndMethod
from ine_callback.scores import Attribution

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext


@dataclass(frozen=True)
class BIF(BIFSettings, FitEndMethod):
    """Settings of the chains; the defaults need no tuning on small networks.

    Args:
        chains: Chains C that advance together; even with ``reduced``, where they come in mirrored pairs.
        draws: Draws T of each chain, every one a pass over the rows and queries.
        thinning: Steps from one draw to the next.
        burn_in: Steps before the first draw. Chains that start from the quadratic posterior's law need none; those of
            ``rmsprop`` start at the trained weights and need some hundred.
        step_size: ε; None: the largest stable one, found by a short search. For ``curvature`` it is in units of the
            inverse curvature: a step of 1 halves the distance from the centre, 4 is unstable.
        n_beta: Weight of the mean loss in the posterior; None: such that the data are as strong as the localization
            where the loss is steepest.
        localization: γ, which holds draws near the trained weights; None: such that draws are half the weights' norm
            away, or nearer where the loss would leave its basin.
        batch_size: Rows of a minibatch, drawn anew at every step and shared by the chains.
        preconditioner: ``"curvature"`` steps in units of the posterior's own curvature; ``"none"`` is plain SGLD;
            ``"rmsprop"`` scales every coordinate by its gradients' size at the trained weights.
        reduced: Whether to lower the Monte-Carlo noise (control-variate chain, mirrored pairs, averaged noise, anchored
            gradients). Off: the estimator as published. Not with ``rmsprop``, for which no control variate is known.
        rows: Dataset indices to score; a number: that many, drawn at random; None: all, at most ``MAX_ROWS``.
        curvature_rows: Rows whose gradients give the quadratic posterior's curvature.
        eval_rows: Rows evaluated at a time.
        normalized: Whether rows are ranked and shown by the correlation of loss and query instead of their covariance.
            Correlations compare rows of unlike losses; covariances add up over rows, and agree better with retraining.
        per_token: Whether each term of a row's loss (the tokens of a sequence) gets a score too; a row's terms add up
            to its score. Without ``rows``, the rows scored have at most ``MAX_TOKENS`` terms together.
        at: When the callback runs chains: numbers of finished epochs, or the ``"end"`` of training.
        seed: Of the chains' own generator.

    Raises:
        InfluenceError: For invalid settings.

    Example:
        >>> BIF(chains=3)
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: BIF: chains=3 must be even with reduced=True (mirrored pairs).
    """

    @property
    def name(self) -> str:  # type: ignore[override]  # no setting of a dataclass
        """Name of the method in reports."""
        return NAME

    def check(self, processes: int) -> None:
        """Refuses chains that cannot be divided among the processes."""
        check_divisible(self, processes)

    def run(self, context: FitContext) -> Attribution:
        """Runs chains around the present weights."""
        from ine_callback.methods.bif.in_fit import run_chains  # at first use: reading saved scores needs no chains

        return run_chains(self, context)
