"""Nuisances from what a user gives: a word, a pair of estimators, or nuisances."""

from __future__ import annotations

from typing import Any

from ine_callback.effects.nuisances import Basis, FoldByFold, Logistic, Nuisances, Ridge
from ine_callback.errors import InfluenceError


def nuisances(chosen: str | tuple[Any, Any] | Nuisances) -> Nuisances:
    """Nuisances from what a user gives.

    Args:
        chosen: ``"spline"``, ``"linear"``, ``"network"``, a pair of a regressor and a classifier with scikit-learn's
            methods, or :class:`Nuisances` such as :class:`~ine_callback.effects.Networks`.

    Raises:
        InfluenceError: If it is none of these.
    """
    if isinstance(chosen, Nuisances):
        return chosen
    if isinstance(chosen, str) and chosen in ("linear", "spline"):
        splines = chosen == "spline"
        plain, quadratic = Basis(splines, products=False), Basis(splines=False, products=True)
        return FoldByFold(Ridge(Basis(splines, products=splines)), Logistic(plain), Logistic(quadratic), chosen)
    if chosen == "network":
        from ine_callback.effects.networks import Networks  # with torch and Lightning

        return Networks()
    if isinstance(chosen, tuple) and len(chosen) == 2:
        regressor, classifier = chosen
        if all(hasattr(regressor, m) for m in ("fit", "predict")) and hasattr(classifier, "predict_proba"):
            title = f"{type(regressor).__name__}, {type(classifier).__name__}"
            return FoldByFold(regressor, classifier, classifier, title)
    raise InfluenceError(
        f"estimate: nuisances={chosen!r}; choose 'spline', 'linear' or 'network', or give (regressor, classifier) with "
        "fit, predict and predict_proba, or Networks(...)."
    )
