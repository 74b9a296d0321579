"""KAIROS, data values without a model (arXiv 2506.23799): exact leave-one-out, groups, and rows that come and go.

    J      = λ/2 · MMD²(training, reference) + (1 − λ) · mean ‖yᵢ − p̂(xᵢ)‖        lower is better
    value  = (N − 1) · (J without row i − J)                                       > 0: the row helps
    first  = −λ (aᵢ − bᵢ − ā + b̄) − (1 − λ) (rᵢ − r̄)                               the published one, up to a constant

p̂ is a logistic regression on the reference alone, rᵢ = ‖yᵢ − p̂(xᵢ)‖ with y one-hot; aᵢ and bᵢ are the means of the
kernel over the training rows and the reference. Both forms cost the same sums (:mod:`ine_callback.stats.mmd`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.kairos.inputs import LabelModel, labels_of, refuse_shared
from ine_callback.methods.kairos.settings import NAME, KAIROSSettings
from ine_callback.methods.row_features import checked_features, digests
from ine_callback.scores import Attribution, Check, Floats, QueryInfo
from ine_callback.stats.mmd import (
    MMD,
    FourierKernel,
    GaussianKernel,
    Kernel,
    conformal_p,
    median_distance,
)
from ine_callback.stats.ranks import spearman
from ine_callback.utilities.tracking import Track, untracked
from ine_callback.utilities.validate import listed, row_ids

QUESTION = "Does this row bring the training set closer to the reference?"
LEGEND = (
    "A value > 0: without the row, the training set is less like the reference. features and labels are the two parts "
    "(values = λ features + (1 − λ) labels); a small conformal_p: the row sticks out. A group's is no sum."
)
HALVES_AGREE, FOURIER_AGREES, SAMPLE = 0.5, 0.9, 300


class DataValues:
    """Values of training rows against a clean reference, while rows are added and removed.

    Args:
        reference: Features of the M reference rows [M, d].
        labels: Their classes [M]; None with ``lam=1``.
        settings: How values are computed.

    Attributes:
        sigma: The kernel's bandwidth in use.
        rows: Ids of the training rows [N]: their positions in the order in which they were added.

    Raises:
        InfluenceError: If there are fewer than two reference rows, or features or labels that no value can come from.

    Example:
        >>> clean = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> found = DataValues(clean, None, KAIROSSettings(lam=1)).update([[0.5], [9.0], [2.5]])
        >>> found.values.round(2), found.remove([1]).rows
        (array([ 0.3 , -0.18,  0.3 ]), array([0, 2]))
    """

    def __init__(self, reference: ArrayLike | Tensor, labels: Any, settings: KAIROSSettings) -> None:
        v = checked_features(reference, NAME, "reference")
        if len(v) < 2:
            raise InfluenceError(f"{NAME}: the reference has {len(v)} row; give at least 2, better some hundred.")
        self.settings, self._digests, self._origin = settings, digests(v), v.mean(0)
        self._v = v - self._origin  # distances stay, and rounding of large means goes
        self.sigma = _sigma(self._v, settings)
        count = settings.random_features
        self._kernel: Kernel = (
            GaussianKernel(self.sigma) if count is None else FourierKernel(self.sigma, v.shape[1], count, settings.seed)
        )
        order = torch.randperm(len(v), generator=torch.Generator().manual_seed(settings.seed))
        self._halves = [self._v[half] for half in (order[: len(v) // 2], order[len(v) // 2 :])]
        self._within = float(self._kernel.self_sums(self._v).mean()) / len(v)
        self._labels = (
            None if settings.lam == 1 else LabelModel(self._v.numpy(), labels_of(labels, len(v), "reference"))
        )
        self.rows: NDArray[np.int64] = np.zeros(0, np.int64)
        self._next = 0
        empty = self._v.new_zeros(0)
        self._x, self._sums, self._residuals = self._v[:0], empty, empty
        self._cross = self._v.new_zeros(2, 0)  # sums of the kernel over each half of the reference
        self._absent = np.zeros(0, bool)

    # -- rows come and go --------------------------------------------------------------------------------------------

    def update(self, x: ArrayLike | Tensor, y: Any = None) -> DataValues:
        """Adds m rows, in O(m (N + M)) kernel values; values are then those of all rows.

        Args:
            x: Features [m, d].
            y: Classes [m]; not needed with ``lam=1``.

        Raises:
            InfluenceError: For bad features or labels, or rows that the reference has too.
        """
        x = checked_features(x, NAME, "training")
        self._check_width(x)
        refuse_shared(digests(x), self._digests)
        return self.add(x, y)

    def add(self, x: ArrayLike | Tensor, y: Any = None, track: Track = untracked) -> DataValues:
        """Like :meth:`update`, for learned features, in which rows may coincide with others of the reference."""
        x = checked_features(x, NAME, "training")
        self._check_width(x)
        x = x - self._origin
        absent, residuals = np.zeros(len(x), bool), x.new_zeros(len(x))
        if self._labels is not None:
            known = labels_of(y, len(x), "training")
            absent, found = self._labels.residuals(x.numpy(), known)
            residuals = torch.from_numpy(found)
            if absent.any():
                warnings.warn(f"{NAME}: {_absent_note(int(absent.sum()))}", stacklevel=2)
        own = self._kernel.self_sums(x, track)
        if len(self._x):
            self._sums = self._sums + self._kernel.sums(self._x, x)
            own = own + self._kernel.sums(x, self._x)
        self._sums = torch.cat([self._sums, own])
        self._cross = torch.cat([self._cross, torch.stack([self._kernel.sums(x, half) for half in self._halves])], 1)
        self._x, self._residuals = torch.cat([self._x, x]), torch.cat([self._residuals, residuals])
        self._absent = np.concatenate([self._absent, absent])
        self.rows = np.concatenate([self.rows, np.arange(self._next, self._next + len(x))])
        self._next += len(x)
        return self

    def remove(self, rows: Iterable[int]) -> DataValues:
        """Removes m rows by their ids, in O(m N) kernel values; the others keep their ids.

        Raises:
            ValueError: If an id is named twice.
            KeyError: If there is no such row.
            InfluenceError: If fewer than two rows would be left.
        """
        gone = self._positions(rows, "DataValues.remove")
        keep = torch.ones(len(self.rows), dtype=torch.bool)
        keep[gone] = False
        if keep.sum() < 2:
            raise InfluenceError(f"{NAME}: removing {len(gone)} of {len(keep)} rows leaves no two; remove fewer.")
        self._sums = self._sums[keep] - self._kernel.sums(self._x[keep], self._x[gone])
        self._x, self._residuals, self._cross = self._x[keep], self._residuals[keep], self._cross[:, keep]
        self.rows, self._absent = self.rows[keep.numpy()], self._absent[keep.numpy()]
        return self

    # -- what the rows are worth -------------------------------------------------------------------------------------

    @property
    def mmd2(self) -> float:
        """MMD² of the training rows to the reference."""
        return float(self._mmd().value)

    @property
    def features(self) -> Floats:
        """The features' part [N]: (N − 1)/2 times the change of MMD² without the row, or its first order."""
        mmd = self._mmd()
        if self.settings.loo:
            return _host((len(self.rows) - 1) / 2 * (mmd.without_each() - mmd.value))
        return _host(-mmd.derivative() / 2)

    @property
    def labels(self) -> Floats | None:
        """The labels' part [N]: how much nearer the label is to the reference's prediction than those of all rows are.

        None with ``lam=1``.
        """
        return None if self._labels is None else _host(self._residuals.mean() - self._residuals)

    @property
    def values(self) -> Floats:
        """The values [N]; above 0: the row helps."""
        lam, labels = self.settings.lam, self.labels
        return self.features if labels is None else lam * self.features + (1 - lam) * labels

    def group(self, rows: Iterable[int]) -> float:
        """Exact value of g rows together: (N − g) · (J without them − J), in O(g²) kernel values.

        Of one row it is the row's leave-one-out value. Not the sum of the rows' values: duplicates, for instance, are
        harmless one at a time.

        Raises:
            ValueError: If an id is named twice.
            KeyError: If there is no such row.
            InfluenceError: If no two rows would be left.
        """
        at = self._positions(rows, "DataValues.group")
        left = len(self.rows) - len(at)
        if left < 2:
            raise InfluenceError(f"{NAME}: a group of {len(at)} of {len(self.rows)} rows leaves no two; name fewer.")
        mmd, lam = self._mmd(), self.settings.lam
        among = self._kernel.self_sums(self._x[at]).sum()
        residuals = (self._residuals.sum() - self._residuals[at].sum()) / left - self._residuals.mean()
        return left * float(lam / 2 * (mmd.without(at, among) - mmd.value) + (1 - lam) * residuals)

    def conformal_p(self) -> Floats:
        """Conformal p-values [N] of "the features are like the reference's"; small: the row sticks out.

        Half of the reference measures, the other half calibrates: no p-value is below 1/(M/2 + 1).
        """
        self._mmd()
        return _host(conformal_p(self._kernel, self._x, self._sums, *self._halves))

    def attribution(self, query: str = "reference", notes: tuple[str, ...] = ()) -> Attribution:
        """The values with their parts and p-values as columns, in the form of every method's scores.

        Args:
            query: Name of the reference.
            notes: Further sentences for the reader.
        """
        columns = {"features": self.features[:, None], "conformal_p": self.conformal_p()[:, None]}
        if (labels := self.labels) is not None:
            columns["labels"] = labels[:, None]
        absent = int(self._absent.sum())
        how = "exact leave-one-out" if self.settings.loo else "first order"
        sigma = f"σ {self.sigma:.4g}" + (" (median distance)" if self.settings.sigma == "median" else "")
        return Attribution(
            NAME,
            self.rows,
            (QueryInfo(query, "custom", QUESTION),),
            self.values[:, None],
            columns=columns,
            doubtful=self._absent[:, None] if absent else None,
            checks=self._checks(),
            settings={each.name: getattr(self.settings, each.name) for each in fields(KAIROSSettings)}
            | {"sigma_used": self.sigma},
            notes=(*notes, *([_absent_note(absent)] if absent else [])),
            title="Data values",
            headline=f"{len(self.rows):,} rows against {len(self._v):,} of the reference · {how} · {sigma}",
            legend=LEGEND,
        )

    def _checks(self) -> tuple[Check, ...]:
        own = self._sums / len(self._sums)
        gaps = [_host(own - each / len(half)) for each, half in zip(self._cross, self._halves, strict=True)]
        agree = spearman(*gaps)
        checks = [
            Check(
                "rank agreement of the reference's halves, features alone",
                agree,
                f"above {HALVES_AGREE}",
                agree > HALVES_AGREE,
                "give more reference rows",
            )
        ]
        if self.settings.random_features is not None:
            some = torch.randperm(len(self._x), generator=torch.Generator().manual_seed(0))[:SAMPLE]
            exact = GaussianKernel(self.sigma)
            a, b = (exact.sums(self._x[some], each) / len(each) for each in (self._x, self._v))
            agree = spearman(_host(a - b), _host((own - self._cross.sum(0) / len(self._v))[some]))
            remedy = "raise random_features, or leave it out"
            checks.append(
                Check(
                    f"rank agreement of random features with the kernel, {len(some)} rows",
                    agree,
                    f"above {FOURIER_AGREES}",
                    agree > FOURIER_AGREES,
                    remedy,
                )
            )
        return tuple(checks)

    def _mmd(self) -> MMD:
        if len(self.rows) < 2:
            raise InfluenceError(f"{NAME}: {len(self.rows)} training rows have no values; update() with at least 2.")
        ones = torch.ones_like(self._sums)
        return MMD(self._sums, self._cross.sum(0) / len(self._v), ones, self._within)

    def _positions(self, rows: Iterable[int], who: str) -> Tensor:
        ids = row_ids(rows, self._next, who)
        if missing := sorted(set(ids.tolist()) - set(self.rows.tolist())):
            raise KeyError(f"{who}: row {listed(np.array(missing))} was removed before; name rows of .rows")
        return torch.from_numpy(np.searchsorted(self.rows, ids))

    def _check_width(self, x: Tensor) -> None:
        if x.shape[1] != self._v.shape[1]:
            raise InfluenceError(
                f"{NAME}: training rows have {x.shape[1]} features, the reference {self._v.shape[1]}; use the same."
            )


def kairos(
    x: ArrayLike | Tensor,
    y: Any,
    v: ArrayLike | Tensor,
    yv: Any,
    *,
    sigma: float | str = "median",
    lam: float = 0.97,
    loo: bool = True,
    random_features: int | None = None,
    seed: int = 0,
) -> DataValues:
    """Values of the rows ``x`` with labels ``y`` against a clean reference ``v`` with labels ``yv``; no training.

    Args:
        x: Features of the training rows [N, d], more dimensions are flattened.
        y: Their classes [N]: integers or texts; None with ``lam=1``.
        v: Features of the reference rows [M, d].
        yv: Their classes [M].
        sigma: See :class:`~ine_callback.methods.kairos.settings.KAIROSSettings`, as the others.
        lam: Weight of the features.
        loo: Exact leave-one-out values; else first-order ones.
        random_features: Frequencies that approximate the kernel; None: exact.
        seed: Of what is drawn.

    Raises:
        InfluenceError: For bad settings, features or labels, or rows that the reference has too.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> v = rng.normal(size=(60, 2))
        >>> x = rng.normal(size=(40, 2))
        >>> labels = (x[:, 0] > 0).astype(int)
        >>> labels[3] = 1 - labels[3]
        >>> found = kairos(x, labels, v, (v[:, 0] > 0).astype(int))
        >>> int(found.values.argmin())
        3
    """
    settings = KAIROSSettings(sigma, lam, loo, random_features, seed)
    return DataValues(v, yv, settings).update(x, y)


def _sigma(v: Tensor, settings: KAIROSSettings) -> float:
    sigma = median_distance(v, settings.seed) if settings.sigma == "median" else float(settings.sigma)
    if not sigma > 0:
        raise InfluenceError(
            f"{NAME}: the median distance of two reference rows is 0: features are constant, or most rows are equal; "
            "choose other features, or give sigma."
        )
    return sigma


def _absent_note(count: int) -> str:
    return f"{count:,} rows have a class that the reference lacks: the labels' part says nothing about them"


def _host(tensor: Tensor) -> Floats:
    return np.asarray(tensor.numpy(), dtype=np.float64)
