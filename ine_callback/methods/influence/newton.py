r"""The Newton step of leaving out a whole group of rows.

Sums of influence functions, and of rescaled ones, treat every row as if it alone were left out: of a tight cluster they
underestimate the effect, because its rows stand in for each other. The Newton step takes the parts of all rows T of the
group out of the Fisher together,

    (H - sum_T F_i / N)^-1 sum_T g_i / N,    H = F + D,

by Woodbury's identity in the k C dimensions of the group's gradients under all labels (:mod:`.rif`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.context import FitContext
from ine_callback.methods.influence.rif import MAX_ELEMENTS, Inverse, all_labels
from ine_callback.methods.influence.space import ParameterSpace


def newton_step(
    context: FitContext, space: ParameterSpace, inverse: Inverse, rows: Sequence[int], labels: int, most: float
) -> Tensor:
    """By how much the parameters move [P] when a group of rows is left out, in float64.

    Args:
        context: The trained model.
        space: The parameters.
        inverse: ``H^-1`` of vectors [n, P].
        rows: Dataset indices of the group.
        labels: Number of labels C.
        most: Larger leverages of the group count as this one.

    Raises:
        InfluenceError: If the group's gradients under all labels do not fit into memory.
    """
    if len(rows) * labels * space.size > 4 * MAX_ELEMENTS:
        raise InfluenceError(
            f"IF: a group of {len(rows)} rows has {len(rows) * labels} gradients of {space.size:,} parameters under "
            "all labels, which are too many for a Newton step; take fewer rows, or layers='last'."
        )
    columns, total = [], torch.zeros(1, space.size, dtype=torch.float64)
    for _, each, own in all_labels(context, rows, labels, space.size):
        columns += [space.join({b: one.formed(b) for b in space.blocks}).double() for one in each]
        ones = torch.ones_like(own.scale)[:, None]
        total = total.to(ones.device) + space.join(own.only(space.blocks).weighted_sums(ones)).double()
    fisher = torch.cat(columns)  # [k C, P]
    solved = inverse(fisher)
    found, vectors = torch.linalg.eigh(_symmetric(fisher @ solved.T) / context.rows)
    inner = vectors.T @ (solved @ total[0]) / context.rows
    weights = vectors @ (inner / (1 - found.clamp(0.0, most)))
    step: Tensor = (inverse(total)[0] + weights @ solved) / context.rows
    return step


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.T) / 2
