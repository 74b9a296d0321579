r"""What a closing pass finds: each row's shift of every query at the final weights, in the query's own unit.

Let g_i be a row's gradient, v a query's and F the Fisher, all at the final weights, and R the learning rate that the
run summed up, times what the optimizer makes of it. Training on the row instead of leaving it out lowers the query by

    s_i = (R / N) <(1 + R F)^-1 v, g_i>,

an influence function whose damping 1/R is no free number: it is what R of gradient descent leaves undamped.
"""

from __future__ import annotations

from dataclasses import dataclass

from ine_callback.scores import Floats


@dataclass(frozen=True)
class Closing:
    """What a closing pass found.

    Attributes:
        shift: Shifts s [N, Q] of the queries on data; NaN for rows that the pass did not see.
        contrasts: The same with Rademacher signs on each layer's units [N, Q, J].
        sd: Standard deviation [Q] that random initial weights leave in the query at the end; 0 where they are fixed.
        losses: The queries' values [Q] at the final weights, of which their gradients were taken.
    """

    shift: Floats
    contrasts: Floats
    sd: Floats
    losses: Floats
