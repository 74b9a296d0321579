"""The whole estimator as a function of the rows' weights: whitening, subspaces, projections, heads, measures.

    x̃ = L⁻¹(x − μ)         Q_Y, Q_Z: leading directions of the target and of the sensitive attribute
    Q_Zᵀ Q_Y = V cos Θ Uᵀ   z_j = Q_Z v_j: directions of Z by their angle to the target's space
    shared:    the s directions z_j of the largest cosines, those above chance
    keep = k:  x̃ without span{z_j} but the first k, in the order of keeping: shared directions by rising cosine, then
               the others. A head is fitted on each. Between two, logits are mixed: share α of the next direction.

Slices, ranks and the number s of shared directions are held fixed; all else moves with the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ine_callback.methods.fairness import measures
from ine_callback.methods.fairness.inputs import Variable
from ine_callback.stats.distance_covariance import distance_covariance
from ine_callback.stats.sufficient_dimension import Reduction, eigenspace, kernel, whitening
from ine_callback.stats.weighted_heads import least_squares, logistic

MEASURES = ("loss", "accuracy", "gap", "odds", "dcov")
SHARES = (0.25, 0.5, 0.75)  # of the second of two heads that are mixed
FEW = 4  # heads up to which they are mixed
DCOV_ROWS = 500  # rows of the distance covariance, whose cost is quadratic


@dataclass(frozen=True)
class Geometry:
    """Whitened features and the two spaces.

    Attributes:
        mean: μ [p].
        root: L [p, p].
        whitened: x̃ [n, p].
        target: Q_Y [p, d].
        sensitive: Q_Z [p, e].
        between: Q_Zᵀ Q_Y Q_Yᵀ Q_Z [e, e]: squared cosines are its eigenvalues.
        vectors: V [e, e] in the order of rising cosines, held fixed.
    """

    mean: Tensor
    root: Tensor
    whitened: Tensor
    target: Tensor
    sensitive: Tensor
    between: Tensor
    vectors: Tensor

    @property
    def cosines(self) -> Tensor:
        """Of the pairs of principal directions, rising [min(d, e)]."""
        squares = ((self.between @ self.vectors) * self.vectors).sum(0)
        positive = squares > 1e-20  # the root has no derivative at 0
        found = torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
        return found[-min(self.target.shape[1], self.sensitive.shape[1]) :]

    def order(self, shared: int) -> list[int]:
        """Columns of V in the order in which they are kept."""
        e = len(self.vectors)
        return [*range(e - shared, e), *range(e - shared)]

    def removed(self, keep: int, shared: int) -> Tensor:
        """Orthonormal basis [p, e − keep] of what is left out."""
        return self.sensitive @ eigenspace(self.between, self.order(shared)[keep:], self.vectors)


class Estimator:
    """Cosines and the measures of every point of the path, from weights of the rows.

    Args:
        x: Features [n, p], of full rank.
        target: What is predicted.
        groups: The sensitive attribute.
        ranks: Directions of target and attribute.
        sdr: How directions are found.
        shrinkage: Of the covariance.
        shared: Directions of the attribute that count as shared.
        seed: Of the rows for the distance covariance.

    Attributes:
        fitted: Points of the path with a head of their own.
        points: All: below, above, and the share of the head above.
        sample: Rows for the distance covariance.
    """

    def __init__(
        self,
        x: Tensor,
        target: Variable,
        groups: Variable,
        ranks: tuple[int, int],
        sdr: Reduction,
        shrinkage: float,
        shared: int = 0,
        seed: int = 0,
    ) -> None:
        self._x, self._target, self._groups, self._ranks = x, target, groups, ranks
        self._sdr, self._shrinkage, self.shared = sdr, shrinkage, shared
        self._answers = target.slices if target.numbers is None else target.numbers
        self.fitted = sorted({*range(shared + 1), ranks[1]})
        steps = list(zip(self.fitted, self.fitted[1:], strict=False)) if len(self.fitted) <= FEW else []
        mixed = [(below, above, share) for below, above in steps for share in SHARES]
        self.points = sorted([*((k, k, 0.0) for k in self.fitted), *mixed], key=lambda p: p[0] + p[2])
        self._starts: dict[int, Tensor] = {}
        n = len(x)
        self.sample = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:DCOV_ROWS].sort()[0]

    @property
    def uniform(self) -> Tensor:
        """Equal weights [n]."""
        return self._x.new_full((len(self._x),), 1 / len(self._x))

    def geometry(self, weights: Tensor) -> Geometry:
        """Whitened features and the two spaces."""
        mean, root = whitening(self._x, weights, self._shrinkage)
        whitened = torch.linalg.solve_triangular(root, (self._x - mean).T, upper=False).T
        ours, theirs = (
            eigenspace(kernel(whitened, one.slices, weights, self._sdr), slice(len(mean) - d, None))
            for one, d in zip((self._target, self._groups), self._ranks, strict=True)
        )
        product = theirs.T @ ours
        between = product @ product.T
        vectors = torch.linalg.eigh(between.detach())[1]
        return Geometry(mean, root, whitened, ours, theirs, between, vectors)

    def head(self, geometry: Geometry, keep: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [1 + p, C] of the head at a point, and its outputs [n, C]."""
        basis = geometry.removed(keep, self.shared)
        kept = geometry.whitened - geometry.whitened @ basis @ basis.T
        ridge = 1 / len(self._x)
        if self._target.numbers is not None:
            theta = least_squares(kept, self._answers, weights, ridge)
        else:
            theta = logistic(kept, self._answers, weights, ridge, self._starts.get(keep))
            self._starts.setdefault(keep, theta.detach())
        return theta, theta[0] + kept @ theta[1:]

    @property
    def keeps(self) -> list[float]:
        """Directions kept at each point."""
        return [below + share * (above - below) for below, above, share in self.points]

    def outputs(self, geometry: Geometry, weights: Tensor) -> list[Tensor]:
        """The heads' outputs [n, C] at each point."""
        at = {keep: self.head(geometry, keep, weights)[1] for keep in self.fitted}
        return [torch.lerp(at[below], at[above], share) for below, above, share in self.points]

    def measured(self, outputs: Tensor, weights: Tensor) -> list[Tensor]:
        """The five measures of some outputs."""
        predicted, groups, slices = measures.scores(outputs), self._groups.slices, self._target.slices
        some = weights[self.sample]
        return [
            measures.loss(outputs, self._answers, weights),
            measures.accuracy(outputs, self._answers, weights),
            measures.gap(predicted, groups, weights),
            measures.equalised_odds(predicted, groups, slices, weights),
            distance_covariance(predicted[self.sample], groups[self.sample], some / some.sum()),
        ]

    def __call__(self, weights: Tensor) -> list[Tensor]:
        """Cosines, then the measures of each point: single numbers."""
        weights = weights / weights.sum()
        geometry = self.geometry(weights)
        found = [one for each in self.outputs(geometry, weights) for one in self.measured(each, weights)]
        return [*geometry.cosines, *found]

    def ends(self, weights: Tensor) -> Tensor:
        """Loss and gap with all directions kept, and the loss with none: for the check by leaving rows out [3]."""
        weights = weights / weights.sum()
        geometry = self.geometry(weights)
        none, whole = (self.head(geometry, keep, weights)[1] for keep in (0, self._ranks[1]))
        predicted = measures.scores(whole)
        return torch.stack(
            [
                measures.loss(whole, self._answers, weights),
                measures.gap(predicted, self._groups.slices, weights),
                measures.loss(none, self._answers, weights),
            ]
        )
