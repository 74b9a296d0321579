"""The variance of a row's shift over training runs, as far as one run tells it."""

from __future__ import annotations

import numpy as np

from ine_callback.scores import Floats
from ine_callback.stats import hypothesis_tests as tests


def between_runs(within: Floats, contrasts: Floats) -> Floats:
    """Returns the variance [N] of shifts over training runs, from the scatter of their steps [N] and contrasts [N, J].

    The mean square of a row's J contrasts has few degrees of freedom: it is shrunk to the other rows' (in units of the
    variance within the run), as limma does.
    """
    if not contrasts.any():
        return within
    known = np.where(within > 0, within, np.nan)
    df = np.full(len(known), float(contrasts.shape[1]))
    return tests.moderated_t(np.zeros(len(known)), np.square(contrasts).mean(1) / known, df, known).variance * known
