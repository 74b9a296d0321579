"""What the encoder is trained for: that scores rank subsets as the losses after training on them do.

Target and loss are those of Sun et al., arXiv 2505.18513. With ℓ(x; S) the loss on x after training on S,

    r(x, S) = (mean_S ℓ − ℓ(x; S)) / sd_S ℓ                      helpful subsets have r > 0
    f(x, S) = e(x)ᵀ Σᵢ αᵢ e(zᵢ),    α = softmax(|e(x)ᵀ e(zᵢ)|), or αᵢ = 1/n
    loss    = mean over pairs with r − r' > .1 of  min(r − r', 5) · log(1 + exp(−(f − f')))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ine_callback.methods.airrep.settings import Pooling

LEAST_GAP, GREATEST_WEIGHT, GREATEST_TARGET = 0.1, 5.0, 10.0


def targets(losses: Tensor) -> Tensor:
    """Standardised helpfulness [Q, M] of M subsets to each query; 0 where a query's losses [Q, M] are all equal.

    >>> targets(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[ 1.,  0., -1.]])
    """
    sd = losses.std(1, keepdim=True)
    return ((losses.mean(1, keepdim=True) - losses) / torch.where(sd > 0, sd, 1)).clamp(
        -GREATEST_TARGET, GREATEST_TARGET
    )


def pooled(queries: Tensor, subsets: Tensor, pooling: Pooling) -> Tensor:
    """Scores f [Q, M] of subsets [M, n, d] for queries [Q, d]; above 0: training on the subset lowers the query's loss.

    >>> pooled(torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 4.0]]]), "attention")  # of one row: the dot product
    tensor([[11.]])
    """
    scores = torch.einsum("qd,mnd->qmn", queries, subsets)
    if pooling == "mean":
        return scores.mean(-1)
    return (scores.abs().softmax(-1) * scores).sum(-1)


def pairwise_loss(scores: Tensor, helpfulness: Tensor) -> Tensor:
    """The ranking loss of scores [Q, M] against the targets r [Q, M]; 0 where no two targets differ enough.

    >>> r = torch.tensor([[2.0, 0.0, 1.0]])
    >>> bool(pairwise_loss(r, r) < pairwise_loss(0 * r, r) < pairwise_loss(-r, r))
    True
    """
    gaps = helpfulness[:, :, None] - helpfulness[:, None]
    kept = gaps > LEAST_GAP
    if not kept.any():
        return scores.sum() * 0.0
    wrong = F.softplus(-(scores[:, :, None] - scores[:, None]))
    return (wrong * gaps.clamp(max=GREATEST_WEIGHT))[kept].mean()
