r"""Rescaled influence functions (arXiv 2506.06656): a row's own part is taken out of the Fisher before it is inverted.

Let the row's part of the Fisher be ``F_i = B B^T`` with its C gradients under all labels as columns of B [P, C], and
``H = F + D``. By Woodbury's identity

    (H - B B^T / N)^-1 g = H^-1 (g + B w),    w = (N - K)^-1 B^T H^-1 g,    K = B^T H^-1 B  [C, C]

so the row's score is that of the gradient ``g + B w``, by whatever way scores are computed. The eigenvalues h of K / N
are the row's leverages, in [0, 1): with one output ``RIF = IF / (1 - h)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ine_callback.methods.context import TOGETHER, FitContext
from ine_callback.methods.influence.fisher import fisher_rows
from ine_callback.methods.influence.space import ParameterSpace
from ine_callback.methods.passes import PerSamplePass
from ine_callback.methods.row_gradients import RowGradients

MAX_LEVERAGE = 1 - 1e-6
MAX_APPROXIMATE = 0.95  # an approximate inverse can give leverages beyond 1
MAX_ELEMENTS = 1 << 25  # of gradients formed at once

Inverse = Callable[[Tensor], Tensor]


def all_labels(
    context: FitContext, rows: Sequence[int], labels: int, size: int
) -> Iterator[tuple[Tensor, list[RowGradients], RowGradients]]:
    """Batches of rows with their gradients f under all labels, and g of their own part of the mean training loss.

    Args:
        context: The trained model.
        rows: Dataset indices.
        labels: Number of labels C.
        size: Number of parameters P: of few rows at once C P numbers each are formed.
    """
    together = max(2, min(TOGETHER, MAX_ELEMENTS // max(1, (labels + 1) * size)))
    starts = context.progress(range(0, len(rows), together), "rescaling")
    with context.without_progress():
        for start in starts:
            part = tuple(rows[start : start + together])
            expected = context.per_sample(PerSamplePass("expected", part))
            found = [fisher_rows(gradients, len(part)) for _, gradients in expected]
            for which, own in context.per_sample(PerSamplePass(rows=part)):
                yield which, found, own.rescaled(torch.full_like(own.scale, len(part)))


def label_weights(
    space: ParameterSpace, inverse: Inverse, labels: Sequence[RowGradients], own: RowGradients, rows: int, most: float
) -> tuple[Tensor, Tensor]:
    """The weights w [b, C], and each row's largest leverage [b].

    Args:
        space: The parameters.
        inverse: ``H^-1`` of vectors [n, P].
        labels: The rows' C gradients f.
        own: Their gradients g.
        rows: Number of training rows N.
        most: Larger leverages count as this one.
    """
    count = len(own.scale)
    weights, leverages = [], []
    formed = {b: torch.stack([one.formed(b) for one in (*labels, own)], 1) for b in space.blocks}
    for k in range(count):
        columns = space.join({block: gradients[k] for block, gradients in formed.items()}).double()
        gram = columns @ inverse(columns).T / rows
        found, vectors = torch.linalg.eigh((gram[:-1, :-1] + gram[:-1, :-1].T) / 2)
        rest = 1 - found.clamp(0.0, most)
        weights.append(vectors @ ((vectors.T @ gram[:-1, -1]) / rest))
        leverages.append(found[-1])
    return torch.stack(weights), torch.stack(leverages)
