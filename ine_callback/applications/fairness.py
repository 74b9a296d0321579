"""Fair subspaces as they lie in a report: directions, the trade-off path, projections and heads to put into a network.

What they are and how they are computed: :mod:`ine_callback.methods.fairness` and docs/methods/fairness.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ine_callback.scores import Attribution, Floats

if TYPE_CHECKING:
    from torch import nn

NAME = "fair"  # of the method in reports
Kind = Literal["target", "shared", "sensitive"]
KINDS: tuple[Kind, ...] = ("target", "shared", "sensitive")
COLUMNS = (
    "keep",
    "loss",
    "accuracy",
    "gap",
    "odds",
    "dcov",
    "loss_se",
    "accuracy_se",
    "gap_se",
    "odds_se",
    "dcov_se",
    "p",
)
WHO = "Subspaces"


@dataclass(frozen=True)
class Direction:
    """A direction of the features that tells about the target, about the sensitive attribute, or about both.

    Attributes:
        kind: ``"target"``, ``"shared"`` or ``"sensitive"``.
        cosine: Of its angle to the nearest direction of the other space.
        low: Lower end of the cosine's 95 % interval.
        high: Its upper end.
    """

    kind: Kind
    cosine: float
    low: float
    high: float


@dataclass(frozen=True)
class PathPoint:
    """What a head achieves on the features without the sensitive directions but the first ``keep``.

    Attributes:
        keep: Directions kept: 0 to all of the attribute's; between two heads they are mixed.
        loss: Mean cross entropy, or squared error.
        accuracy: Share of right classes, or for numbers of variance explained.
        gap: Demographic parity gap, in probability or in the target's unit.
        odds: Equalised-odds gap: the greatest gap within a class or slice of the target.
        dcov: Squared distance covariance of predictions and groups.
        loss_se: Standard error, as the others, by the influence function of the whole estimator.
        accuracy_se: Of the accuracy of the head as it is.
        gap_se: Of the gap.
        odds_se: Of the equalised-odds gap.
        dcov_se: Of the distance covariance; says little where that is near 0, where ``p`` does.
        p: Permutation p-value of "predictions and groups are independent".
    """

    keep: float
    loss: float
    accuracy: float
    gap: float
    odds: float
    dcov: float
    loss_se: float
    accuracy_se: float
    gap_se: float
    odds_se: float
    dcov_se: float
    p: float


def holds_subspaces(found: Attribution) -> bool:
    """Whether an attribution is one of :class:`~ine_callback.FairSubspaces`, with all that it holds."""
    wanted = {"path": len(COLUMNS), "directions": 4}
    shapes = {name: found.arrays[name].shape for name in wanted if name in found.arrays}
    if found.method != NAME or {name: shape[1:] for name, shape in shapes.items()} != {
        k: (v,) for k, v in wanted.items()
    }:
        return False
    return bool(shapes["path"][0] and np.isin(found.arrays["directions"][:, 0], range(len(KINDS))).all())


def subspaces_of(found: Attribution | None) -> Subspaces:
    """The subspaces that a report's attribution holds.

    Raises:
        ValueError: If there is none.
    """
    if found is None:
        raise ValueError(f"{WHO}: FairSubspaces did not run here; train with methods=[FINE(), FairSubspaces(...)]")
    return Subspaces(found)


class Subspaces:
    """The subspaces that :class:`~ine_callback.FairSubspaces` found; needs neither the network nor its data.

    Args:
        attribution: What the method returned, or a report holds.

    Raises:
        ValueError: If the attribution holds no subspaces.

    Example:
        >>> import numpy as np
        >>> from ine_callback import fair_subspaces
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(400, 4))
        >>> z = (x[:, 0] + 0.5 * rng.normal(size=400) > 0).astype(int)
        >>> y = x[:, 0] + x[:, 1] + rng.normal(size=400)
        >>> found = fair_subspaces(x, y, z)
        >>> len(found.directions), found.path[0].gap < 1e-9, found.path[-1].gap > 1
        (2, True, True)
        >>> found.choose(gap=0.5).keep, type(found.projection(keep=0)).__name__
        (0.25, 'Projection')
    """

    def __init__(self, attribution: Attribution) -> None:
        if not holds_subspaces(attribution):
            raise ValueError(f"{WHO}: attribution by {attribution.method!r} holds no subspaces; use FairSubspaces")
        self.attribution = attribution

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The target's own, then shared ones, then the attribute's own, each by falling cosine."""
        table = self._array("directions")
        return tuple(Direction(KINDS[int(kind)], *map(float, rest)) for kind, *rest in table)

    @property
    def path(self) -> tuple[PathPoint, ...]:
        """From all sensitive directions left out to all kept."""
        return tuple(PathPoint(*map(float, line)) for line in self._array("path"))

    def choose(self, gap: float) -> PathPoint:
        """The point that keeps most with a parity gap up to ``gap``, on the training rows.

        Raises:
            ValueError: If no point has such a gap.
        """
        fit = [point for point in self.path if point.gap <= gap]
        if not fit:
            least = min(point.gap for point in self.path)
            raise ValueError(f"{WHO}.choose: no point has a gap up to {gap}; the least is {least:.3g}")
        return max(fit, key=lambda point: point.keep)

    def projection(self, keep: float = 0.0) -> nn.Module:
        """A module that leaves sensitive directions out of features [b, p], to put before the head.

        It is affine, with buffers and no parameter. What it returns lies in the features' own coordinates, so that the
        network's head can stay; train that a little further, or take :meth:`head`.

        Args:
            keep: Directions kept, in the order of the path; of a fraction the next direction is shrunk to that share.

        Raises:
            ValueError: If there are not so many.
        """
        from ine_callback.applications.projection import Projection

        removed, read = self._array("removed"), self._array("read")
        self._check(keep)
        shares = np.clip(np.arange(1, removed.shape[1] + 1) - keep, 0.0, 1.0)
        return Projection(self._array("mean"), removed * shares, read)

    def head(self, keep: float = 0.0) -> nn.Module:
        """The linear head of a point of the path, on features as they come [b, p]; its projection is in its weights.

        Args:
            keep: Directions kept; between two heads their weights are mixed.

        Raises:
            ValueError: If there are not so many.
        """
        from ine_callback.applications.projection import linear

        self._check(keep)
        at, heads = self._array("heads_at"), self._array("heads")
        above = int(np.searchsorted(at, keep))
        below = above if at[above] == keep else above - 1
        share = 0.0 if above == below else (keep - at[below]) / (at[above] - at[below])
        return linear((1 - share) * heads[below] + share * heads[above])

    def __str__(self) -> str:
        lines = [f"{d.kind:<10} cosine {d.cosine:.2f} ({d.low:.2f} to {d.high:.2f})" for d in self.directions]
        lines.append("keep    loss      accuracy  gap            odds           dCov²     p")
        for one in self.path:
            lines.append(
                f"{one.keep:<7.4g} {one.loss:<9.4g} {one.accuracy:<9.3f} {one.gap:.3f} ± {one.gap_se:.3f}  "
                f"{one.odds:.3f} ± {one.odds_se:.3f}  {one.dcov:<9.3g} {one.p:.3f}"
            )
        return "\n".join(lines)

    def _array(self, name: str) -> Floats:
        return np.asarray(self.attribution.arrays[name])

    def _check(self, keep: float) -> None:
        most = self._array("removed").shape[1]
        if not 0 <= keep <= most:
            raise ValueError(f"{WHO}: keep={keep} is not between 0 and {most}, the attribute's directions")
