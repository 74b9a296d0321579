"""Maximum mean discrepancy (MMD) between a sample and a reference, and what leaving rows out makes of it.

    MMD²   = S/N² − 2T/N + R        S = Σ_ij k(xᵢ, xⱼ),  T = Σᵢ bᵢ,  bᵢ = mean_v k(xᵢ, v),  R = mean_vw k(v, w)

(Gretton et al. 2012, JMLR 13). Its derivatives and every leave-out need only the row sums sᵢ = Σⱼ k(xᵢ, xⱼ) and bᵢ.
They are summed in tiles: the [N, N] matrix never exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ine_callback.utilities.tracking import Track, untracked

TILE = 512  # rows of a tile; 2 MB of float64 stay in a core's cache
MEDIAN_ROWS = 1000  # rows whose pairs give the median distance


class Kernel(Protocol):
    """A positive definite kernel with k(x, x) = 1."""

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        """k(x, y) of all pairs [n, m]."""

    def sums(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ_y k(x, y) for each of the rows x [n]."""

    def self_sums(self, x: Tensor, track: Track = untracked) -> Tensor:
        """Σⱼ k(xᵢ, xⱼ) for each row [n], its own term 1 included."""


@dataclass(frozen=True)
class GaussianKernel:
    """k(x, y) = exp(−‖x − y‖² / 2σ²).

    Args:
        sigma: Bandwidth σ, in the features' unit.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> GaussianKernel(2.0).self_sums(x).sub(1).log()
        tensor([-0.5000, -0.5000])
    """

    sigma: float

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        scale = 1 / self.sigma**2
        exponent = torch.addmm(y.square().sum(1) * (-scale / 2), x, y.T, alpha=scale)
        return exponent.sub_((x.square().sum(1) * (scale / 2))[:, None]).clamp_(max=0).exp_()

    def sums(self, x: Tensor, y: Tensor) -> Tensor:
        each = [sum(self.gram(part, other).sum(1) for other in y.split(TILE)) for part in x.split(TILE)]
        return torch.cat([one if isinstance(one, Tensor) else x.new_zeros(0) for one in each])

    def self_sums(self, x: Tensor, track: Track = untracked) -> Tensor:
        total, parts = torch.zeros_like(x[:, 0]), x.split(TILE)
        sums = total.split(TILE)
        for k in track(range(len(parts)), "kernel sums"):
            sums[k].add_(self.gram(parts[k], parts[k]).sum(1))
            for j in range(k + 1, len(parts)):  # each pair of tiles once: k is symmetric
                tile = self.gram(parts[k], parts[j])
                sums[k].add_(tile.sum(1))
                sums[j].add_(tile.sum(0))
        return total


class FourierKernel:
    """The Gaussian kernel by random Fourier features (Rahimi and Recht 2007): sums in time linear in the rows.

    k(x, y) ≈ (1/D) Σ_d cos(ω_d · (x − y)) with ω_d ~ N(0, I/σ²). Cosine and sine of each frequency make it an inner
    product, positive definite, with k(x, x) = 1 exactly. The error of an entry has a standard deviation below 1/√(2D).

    Args:
        sigma: Bandwidth σ of the Gaussian kernel.
        width: Features of a row.
        count: Frequencies D.
        seed: Of the frequencies.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
        >>> exact = GaussianKernel(2.0).gram(x, x)
        >>> float((FourierKernel(2.0, 1, 4096).gram(x, x) - exact).abs().max()) < 0.05
        True
    """

    def __init__(self, sigma: float, width: int, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._frequencies = torch.randn(width, count, generator=generator, dtype=torch.float64) / sigma

    def _features(self, x: Tensor) -> Tensor:
        """The vectors [n, 2D] whose inner products are the kernel."""
        phases = x @ self._frequencies.to(x)
        return torch.cat([phases.cos(), phases.sin()], 1) / math.sqrt(phases.shape[1])

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return self._features(x) @ self._features(y).T

    def sums(self, x: Tensor, y: Tensor) -> Tensor:
        total = torch.stack([self._features(part).sum(0) for part in y.split(TILE)]).sum(0)
        return torch.cat([self._features(part) @ total for part in x.split(TILE)])

    def self_sums(self, x: Tensor, track: Track = untracked) -> Tensor:
        return self.sums(x, x)


def median_distance(x: Tensor, seed: int = 0) -> float:
    """Median of ‖x − x'‖ over pairs of rows, of at most 1,000 rows drawn at random (the median heuristic for σ).

    Example:
        >>> median_distance(torch.tensor([[0.0], [1.0], [3.0]]))
        2.0
    """
    picked = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:MEDIAN_ROWS]
    return float(torch.nn.functional.pdist(x[picked.to(x.device)]).quantile(0.5))


@dataclass(frozen=True)
class MMD:
    """MMD² of N rows to a reference, with what it becomes without some of them, from kernel sums.

    Args:
        sums: sᵢ = Σⱼ k(xᵢ, xⱼ), the own term included [N].
        cross: bᵢ, mean of k(xᵢ, v) over the reference [N].
        diagonal: k(xᵢ, xᵢ) [N].
        reference: R, mean of k(v, w) over pairs of the reference. A constant; the unbiased one leaves out v = w.
        unbiased: Whether S leaves out the pairs of a row with itself (U-statistic).

    Example:
        >>> x, v, kernel = torch.tensor([[0.0], [5.0]]), torch.tensor([[0.0], [1.0]]), GaussianKernel(1.0)
        >>> sums, cross = kernel.self_sums(x), kernel.sums(x, v) / 2
        >>> mmd = MMD(sums, cross, torch.ones(2), float(kernel.self_sums(v).mean() / 2))
        >>> mmd.without_each() - mmd.value  # the second row is far from the reference: better without it
        tensor([ 1.3031, -0.3031])
    """

    sums: Tensor
    cross: Tensor
    diagonal: Tensor
    reference: float
    unbiased: bool = False

    def _of(self, pairs: Any, diagonal: Any, cross: Any, n: int) -> Any:
        """MMD² of n rows from the sums of all their pairs, of their diagonal and of their b."""
        within = (pairs - diagonal) / (n * (n - 1)) if self.unbiased else pairs / n**2
        return within - 2 * cross / n + self.reference

    @property
    def value(self) -> Tensor:
        """MMD² of all rows, a scalar."""
        found: Tensor = self._of(self.sums.sum(), self.diagonal.sum(), self.cross.sum(), len(self.sums))
        return found

    def without_each(self) -> Tensor:
        """MMD² without each row [N]: exact, from the sums alone.

        MMD²₋ᵢ = (S − 2sᵢ + kᵢᵢ)/(N−1)² − 2(T − bᵢ)/(N−1) + R
        """
        pairs = self.sums.sum() - 2 * self.sums + self.diagonal
        diagonal, cross = self.diagonal.sum() - self.diagonal, self.cross.sum() - self.cross
        found: Tensor = self._of(pairs, diagonal, cross, len(self.sums) - 1)
        return found

    def without(self, rows: Tensor, among: Tensor) -> Tensor:
        """MMD² without a group of rows, a scalar; exact, and no sum over the rows.

        Args:
            rows: Positions of the g rows [g], each once.
            among: Σ k(xᵢ, xⱼ) over the pairs of the group, a scalar.
        """
        pairs = self.sums.sum() - 2 * self.sums[rows].sum() + among
        diagonal, cross = (each.sum() - each[rows].sum() for each in (self.diagonal, self.cross))
        found: Tensor = self._of(pairs, diagonal, cross, len(self.sums) - len(rows))
        return found

    def derivative(self) -> Tensor:
        """d/dε MMD²((1−ε) Q + ε δᵢ) at 0 for each row [N], Q the rows' empirical law: 2 (aᵢ − bᵢ − ā + b̄), a = s/N."""
        gap = self.sums / len(self.sums) - self.cross
        return 2 * (gap - gap.mean())


def conformal_p(kernel: Kernel, x: Tensor, sums: Tensor, scored: Tensor, calibration: Tensor) -> Tensor:
    """One-sided conformal p-values [N] of "the row is exchangeable with the reference"; small: it sticks out.

    For row i let c(z) = mean_{j≠i} k(z, xⱼ) − mean_{v∈V₁} k(z, v): how much more z is like the other rows than like
    the reference. Then p = (1 + #{v ∈ V₂: c(v) ≥ c(xᵢ)}) / (|V₂| + 1). The row has no part in c, nor has V₂: for a row
    drawn like the reference, P(p ≤ α) ≤ α holds exactly, for any training set and any size (Bates et al. 2023,
    arXiv 2104.08279).

    Args:
        kernel: The kernel.
        x: Features of the N rows [N, d].
        sums: Σⱼ k(xᵢ, xⱼ), the own term included [N].
        scored: V₁, reference rows that c is measured with [m, d].
        calibration: V₂, other reference rows [n, d].
    """
    others, found = len(x) - 1, []
    of_all = kernel.sums(calibration, x)
    baseline = kernel.sums(calibration, scored) / len(scored)
    own = (sums - 1) / others - kernel.sums(x, scored) / len(scored)
    for part, score in zip(x.split(TILE), own.split(TILE), strict=True):
        c = (of_all - kernel.gram(part, calibration)) / others - baseline
        found.append((1 + (c >= score[:, None]).sum(1)).to(x) / (len(calibration) + 1))
    return torch.cat(found)
