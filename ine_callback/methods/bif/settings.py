"""The settings of BIF, checked; :class:`.BIF` documents them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ine_callback.errors import InfluenceError
from ine_callback.methods.fit_end import check_stages
from ine_callback.scores import Stage

Preconditioner = Literal["curvature", "none", "rmsprop"]


@dataclass(frozen=True)
class BIFSettings:
    """What :class:`.BIF` is constructed with.

    Raises:
        InfluenceError: For invalid settings.
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

    def settings(self) -> dict[str, Any]:
        """The settings as plain types; a list of rows becomes its length."""
        rows = self.rows if self.rows is None or isinstance(self.rows, int) else len(self.rows)
        return asdict(self) | {"rows": rows, "at": list(self.at)}
