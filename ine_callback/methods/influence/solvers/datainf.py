r"""DataInf (arXiv 2310.00902): the inverse of a mean is replaced by the mean of inverses, block by block.

x = 1/N sum_i (f_i f_i^T + lambda)^-1 v = 1/(N lambda) sum_i [v - f_i (f_i^T v) / (lambda + |f_i|^2)]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ine_callback.methods.influence.solvers.base import Solution, System


def datainf(system: System, v: Tensor) -> Solution:
    """The closed form, with each block's damping; the residual says how far it is from the inverse of the mean."""
    space = system.space
    parts, damping = space.split(v), space.split(system.damping[None])
    removed = {block: torch.zeros_like(part) for block, part in parts.items()}
    for _, gradients in system.fisher.batches(None, 0):
        with torch.no_grad():
            for block, part in parts.items():
                one = gradients.only([block])
                weight = 1 / (damping[block].flatten()[0] + one.squared_norms())
                removed[block] += one.weighted_sums(one.products({block: part}) * weight[:, None])[block]
    x = space.join({b: (part - removed[b] / system.fisher.rows) / damping[b] for b, part in parts.items()})
    return Solution(x, system.residual(x, v), exact=False)
