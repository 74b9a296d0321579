"""BIF, the Bayesian influence function (arXiv 2509.26544): its settings. The chains run in ``bif/run.py``.

    posterior   p(w) ∝ exp(−n_beta L(w) − (γ/2) ‖w − w*‖²) around the trained weights w*, L the training's own loss
    score       + Cov_p(ℓ_i(w), φ(w))         > 0: training on row i lowers the query φ (helpful)

The paper's BIF is −Cov; the sign is changed so that it means the same as f-INE's. To first order the score is the
damped influence function: Cov = gᵢᵀ (n_beta H + γ)⁻¹ ∇φ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.scores import NAME
from ine_callback.methods.fit_end import FitEndMethod, check_stages
from ine_callback.scores import Attribution, Stage

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext

Preconditioner = Literal["curvature", "none", "rmsprop"]


@dataclass(frozen=True)
class BIF(FitEndMethod):
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

    chains: int = 8
    draws: int = 200
    thinning: int = 2
    burn_in: int = 0
    step_size: float | None = None
    n_beta: float | None = None
    localization: float | None = None
    batch_size: int = 256
    preconditioner: Preconditioner = "curvature"
    reduced: bool = True
    rows: Sequence[int] | int | None = None
    curvature_rows: int = 512
    eval_rows: int = 256
    normalized: bool = False
    per_token: bool = False
    at: Sequence[Stage] = ("end",)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("chains", "draws", "thinning", "batch_size", "curvature_rows", "eval_rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InfluenceError(f"BIF: {name}={value!r} must be an integer of at least 1.")
        if isinstance(self.burn_in, bool) or not isinstance(self.burn_in, int) or self.burn_in < 0:
            raise InfluenceError(f"BIF: burn_in={self.burn_in!r} must be an integer of at least 0.")
        for name in ("step_size", "n_beta", "localization"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InfluenceError(f"BIF: {name}={value!r} must be positive.")
        if self.preconditioner not in get_args(Preconditioner):
            raise InfluenceError(f"BIF: preconditioner={self.preconditioner!r} is none of {get_args(Preconditioner)}.")
        if self.draws < 4:
            raise InfluenceError(f"BIF: draws={self.draws} are too few for a covariance; take at least 4, better 100.")
        if self.reduced and self.preconditioner == "rmsprop":
            raise InfluenceError(
                "BIF: preconditioner='rmsprop' has no control-variate chain; pass reduced=False, or use 'curvature'."
            )
        if self.reduced and self.chains % 2:
            raise InfluenceError(f"BIF: chains={self.chains} must be even with reduced=True (mirrored pairs).")
        check_stages("BIF", self.at)

    @property
    def name(self) -> str:  # type: ignore[override]  # no setting of a dataclass
        """Name of the method in reports."""
        return NAME

    def run(self, context: FitContext) -> Attribution:
        """Runs chains around the present weights."""
        from ine_callback.methods.bif.in_fit import run_chains  # imports this module

        return run_chains(self, context)

    def settings(self) -> dict[str, Any]:
        """The settings as plain types; a list of rows becomes its length."""
        rows = self.rows if self.rows is None or isinstance(self.rows, int) else len(self.rows)
        return asdict(self) | {"rows": rows, "at": list(self.at)}
