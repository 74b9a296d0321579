"""Which columns cause which by a flow: for relations that no linear regression sees, such as |x|. Not calibrated.

After SIGMA's flow-SEM (Li et al., NeurIPS 2025), with two changes. Its acyclicity penalty is replaced by tiers: a
column's candidates lie in earlier tiers, so no graph has a cycle. And an edge's probability is tempered,

    x_j = m_j(W ∘ x) + s_j(W ∘ x) u_j,  u_j ~ N(0, 1)        loss = − mean log density + α Σ |W_ij|
    p_ij = σ((|W_ij| − t) / T)    instead of σ(|W_ij|),  which is ½ or more where W_ij = 0

averaged over copies, each fitted on a bootstrap sample of the rows; all are stacked and trained in one fit. m_j and
log s_j have one layer of tanh, whose weights have norm 1 on both sides, so |W_ij| bounds |∂m_j / ∂x_i|: left free they
make up for any W. T, t and α are chosen numbers: the probabilities are no posterior of anything. How far they are from
one is measured (``python -m benchmarks.effects``, docs/methods/effects.md), and they are not the default.
"""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ine_callback.effects.data import EffectData
from ine_callback.effects.formulas import Floats
from ine_callback.effects.networks import Batches, fit

THRESHOLD, TEMPERATURE = 0.15, 0.05
COPIES, EPOCHS, BATCH = 8, 60, 128
START = 1.0  # of all strengths: smaller ones are in the linear part of tanh, and shrink before they curve


class FlowSEM(L.LightningModule):
    """Each column as a flow of its possible causes, in stacked copies.

    Batches are ``(x [b, p], weights [b, B])`` of standardised columns; weights are how often a copy's bootstrap sample
    has the row. Trained by any Trainer; ``paths(data, posterior="flow")`` does it.

    Args:
        allowed: ``allowed[i][j]``: whether column i may cause column j [p, p]; without a cycle.
        copies: B.
        hidden: Hidden units of each column.
        sparsity: α.
        learning_rate: Of Adam.
        seed: Of the initial weights.

    Example:
        >>> module = FlowSEM([[False, True], [False, False]], copies=3)
        >>> module.log_density(torch.zeros(4, 2)).shape  # of each copy and row
        torch.Size([3, 4])
    """

    allowed: Tensor

    def __init__(
        self,
        allowed: ArrayLike,
        copies: int = COPIES,
        hidden: int = 16,
        sparsity: float = 0.03,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sparsity, self.learning_rate = sparsity, learning_rate
        self.register_buffer("allowed", torch.as_tensor(np.asarray(allowed), dtype=torch.float32))
        p, random = len(self.allowed), torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(copies, *shape, generator=random))

        self.weight = nn.Parameter(torch.full((copies, p, p), START))  # [B, cause, column]
        self.first, self.bias = normal(p, p, hidden), normal(p, hidden)
        self.last, self.out = normal(p, hidden, 2), nn.Parameter(torch.zeros(copies, p, 2))

    @property
    def strengths(self) -> Tensor:
        """|W| [B, p, p], 0 where no edge is allowed."""
        return self.weight.abs() * self.allowed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of standard deviations [B, n, p] of rows [n, p]."""
        first, last = (w / w.norm(dim=axis, keepdim=True) for w, axis in ((self.first, -1), (self.last, -2)))
        inputs = (self.weight * self.allowed)[..., None] * first  # [B, cause, column, hidden]
        units = torch.tanh(torch.einsum("np,bpch->bnch", x, inputs) + self.bias[:, None])
        mean, log_sd = (torch.einsum("bnch,bchk->bnck", units, last) + self.out[:, None]).unbind(-1)
        return mean, log_sd.clamp(-3, 2)

    def log_density(self, x: Tensor) -> Tensor:
        """Logarithm of the density of rows [n, p] in each copy [B, n]."""
        mean, log_sd = self(x)
        density: Tensor = torch.distributions.Normal(mean, log_sd.exp()).log_prob(x).sum(-1)
        return density

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Sum over copies of the penalised negative log density."""
        x, weights = batch
        weights = weights.T
        density = (self.log_density(x) * weights).sum(1) / weights.sum(1).clamp_min(1e-12)
        return (self.sparsity * self.strengths.sum((1, 2)) - density).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, which treats every number by itself, so that copies stay apart."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def tempered(strengths: Floats) -> Floats:
    """Probability of an edge by its strength.

    Example:
        >>> tempered(np.array([0.0, 0.15, 0.5])).round(3)
        array([0.047, 0.5  , 0.999])
    """
    found: Floats = 1 / (1 + np.exp(-(strengths - THRESHOLD) / TEMPERATURE))
    return found


def edge_chances(data: EffectData, seed: int = 0) -> dict[tuple[str, str], Floats]:
    """Probability of each edge that the tiers allow, in each copy [B].

    Args:
        data: With tiers; columns of one number a row, or several in the first tier.
        seed: Of bootstrap samples, initial weights and the rows' order.
    """
    assert data.tiers is not None
    tier = {name: k for k, names in enumerate(data.tiers) for name in names}
    names = [name for names in data.tiers for name in names]
    columns = [data.matrix([name]) for name in names]
    owner = np.repeat(np.arange(len(names)), [column.shape[1] for column in columns])
    x = np.concatenate(columns, 1)
    deviation = x.std(0)
    x = (x - x.mean(0)) / np.where(deviation > 0, deviation, 1.0)
    allowed = np.array([[tier[names[u]] < tier[names[v]] for v in owner] for u in owner])
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), COPIES).T
    module = FlowSEM(allowed, seed=seed)
    fit(module, Batches([torch.as_tensor(part, dtype=torch.float32) for part in (x, weights)], BATCH, seed), EPOCHS)
    chances = tempered(module.strengths.detach().double().numpy())
    return {
        (u, v): chances[:, owner == i][:, :, owner == j].max((1, 2))
        for i, u in enumerate(names)
        for j, v in enumerate(names)
        if tier[u] < tier[v]
    }
