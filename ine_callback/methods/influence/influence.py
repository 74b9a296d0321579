r"""IF: influence functions of the trained model, as a method in a fit or after it.

    score of row i on query q    s = 1/N <v, (F + D)^-1 g>            > 0: training on the row lowers the query

with the gradients v of the query and g of the row's part of the mean training loss, the Fisher F and the damping D, all
at the final weights (Koh and Liang 2017, Grosse et al. 2023). It is the first-order rise of the query when the row is
left out. kronfluence's score is N s; Koh and Liang's influence of upweighting has the opposite sign.

``rescale="rif"`` (arXiv 2506.06656) takes the row's own part out of the Fisher, ``F - F_i / N`` (:mod:`.rif`). That is
exact for leaving single rows out of least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ine_callback.methods.fit_end import FitEndMethod, Steps
from ine_callback.methods.influence.settings import IFSettings, settings_name

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext


@dataclass(frozen=True)
class IF(IFSettings, FitEndMethod):
    """Influence functions: what leaving a row out would do to a query, by the curvature at the trained weights.

    Args:
        solver: How ``(F + D) x = v`` is solved. ``"ekfac"``, ``"kfac"``, ``"diagonal"``: approximate inverses in closed
            form. ``"identity"``: gradient dot products. ``"exact"``: the whole matrix, for small models. ``"pcg"``,
            ``"cg"``: conjugate gradients over all rows, with and without EK-FAC. ``"astra"``: stochastic descent
            preconditioned by EK-FAC. ``"lissa"``: the same without. ``"datainf"``: the mean of inverses.
        fisher: Labels of the Fisher: ``"exact"``: all of them, by their probability; ``"sampled"``: one drawn for each
            row; ``"empirical"``: the rows' own. None: exact for at most 20 labels, else sampled.
        basis: Where EK-FAC's eigenvectors come from: a pass at the ``"end"``, or the Kronecker factors that f-INE's
            ``"run"`` has averaged, which saves the pass. Eigenvalues are of the final weights in both.
        damping: D: ``"auto"``: a tenth of each block's mean eigenvalue; a number; ``"run"``: what the run itself leaves
            undamped, ``3 / (sum of learning rates)`` times what the optimizer makes of them (SOURCE, arXiv 2405.12186).
            None: that of the run for solvers that reach the solution across layers, where it is known; else auto.
        rescale: ``"rif"``: without the row's own part of the Fisher; at most 64 labels.
        sampler: Which rows make up a minibatch of a stochastic solver, see :mod:`.samplers`.
        iterations: Most steps of an iterative solver.
        batch_size: Rows of a minibatch.
        step: Largest step of a stochastic solver; None: the largest stable one.
        momentum: Of a stochastic solver, below 1.
        tol: Relative residual at which conjugate gradients stop, and rise at which descent shortens its step.
        rows: Dataset indices to score; None: all.
        layers: Patterns of module names to which scores are restricted, or ``"last"``; None: all.
        query_rank: Singular vectors of each layer's part of a solution that are kept, such as 32: for many queries of a
            large model, which are then solved in chunks that fit into memory. None: all.
        per_layer: Whether each layer gets a score of its own; they add up to the row's.
        per_token: Whether each token of a row gets a part of its score. ``"position"`` (or True): by where the row's
            gradient arises; layers without positions, such as norms, count the same at each. ``"label"``: by the
            token's own loss, see :mod:`.label_parts`.
        groups: Sets of rows by name: for each the Newton step of leaving all of it out (:mod:`.newton`), which
            ``report.group(rows, newton=True)`` tells; at most 64 labels.
        at: When it runs: numbers of finished epochs, or the ``"end"`` of training.
        seed: Of drawn labels and minibatches.

    Raises:
        InfluenceError: For invalid settings.

    Example:
        >>> IF(solver="astra", damping="run").name
        'IF-ASTRA'
        >>> IF(damping=0.0)
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: IF: damping=0.0 must be 'auto', 'run' or a number above 0.
    """

    @property
    def name(self) -> str:  # type: ignore[override]  # no setting of a dataclass
        """Name of the method in reports."""
        return settings_name(self)

    def run(self, context: FitContext) -> Steps:
        """Scores rows at the present weights."""
        from ine_callback.methods.influence.run import scored  # at first use: reading saved scores needs no passes

        return scored(self, context)
