"""Fair subspaces of features, free of training.

The definition is ours, after the abstract of "Fairness through subspace decomposition" (arXiv 2510.23935), which names
the parts: sufficient dimension reduction for target and sensitive attribute, shared directions added one at a time, the
error and the fairness gap as they are added, influence functions, distance covariance. We could not read the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ine_callback.applications.fairness import COLUMNS, KINDS, NAME, Subspaces
from ine_callback.errors import InfluenceError
from ine_callback.methods.fairness.estimator import MEASURES, Estimator, Geometry
from ine_callback.methods.fairness.inputs import CLASS_ROWS, GROUP_ROWS, Variable, as_array, missing, variable
from ine_callback.methods.fairness.measures import scores as predictions
from ine_callback.methods.fairness.settings import WHO, FairSettings
from ine_callback.methods.row_features import checked_features
from ine_callback.scores import Attribution, Check, QueryInfo
from ine_callback.stats.distance_covariance import permutation_p
from ine_callback.stats.influence_of import Influence, agreement, influence_of, left_out
from ine_callback.stats.sufficient_dimension import eigenspace, kernel, ledoit_wolf, rank, whitening
from ine_callback.utilities.tracking import Track, untracked

QUERIES = (
    QueryInfo(f"{NAME}/gap", "custom", "Does this row lower the parity gap of a linear head on the features?"),
    QueryInfo(f"{NAME}/risk", "custom", "Does this row lower the mean loss of a linear head on the features?"),
)
LEGEND = (
    "A score > 0: without the row, gap or loss of a linear head on all features would be greater by about that. "
    "The definition of the subspaces is ours, after the abstract of arXiv 2510.23935."
)
UNKNOWNS = 6000  # of a logistic head: its Hessian then has 288 MB
LEVERAGE = 0.5  # of a row, above which some direction rests on it alone
CONSTANT = 1e-9  # variance of a direction relative to the largest, below which the features do not vary
PERMUTED, QUANTILE, Z95 = 99, 0.95, 1.96  # permuted attributes for the threshold of cosines
CHECKED, AGREES = 12, 0.9  # rows left out for the check of the influence values


@dataclass(frozen=True)
class _Ranks:
    """Directions of target and attribute, p-values of the tests, and how many are shared."""

    target: int
    sensitive: int
    target_p: list[float]
    sensitive_p: list[float]
    threshold: float
    shared: int


def fair_subspaces(
    x: ArrayLike | Tensor,
    y: Any,
    z: Any,
    settings: FairSettings | None = None,
    track: Track = untracked,
) -> Subspaces:
    """Directions of the target, of the sensitive attribute and of both, and what leaving the latter out costs.

    Args:
        x: Features [n, p]; more dimensions are flattened.
        y: Target [n]: classes (integers, texts) or numbers.
        z: Sensitive attribute [n]: groups, or numbers, which are sliced. Rows with NaN, None or a negative integer are
            left out and counted.
        settings: How they are found.
        track: Shows a bar.

    Raises:
        InfluenceError: For features that are no finite numbers, a target or attribute that is missing, constant or has
            too few rows of a class or group, or fewer rows than features without shrinkage.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(300, 3))
        >>> z = (x[:, 0] > 0).astype(int)
        >>> found = fair_subspaces(x, z, z)
        >>> [each.kind for each in found.directions], found.path[0].accuracy < 0.6
        (['shared'], True)
    """
    settings = settings or FairSettings()
    features = checked_features(x, WHO, "training")
    attribute = as_array(z, len(features), "sensitive attribute")
    absent = missing(attribute, below_zero=True)
    rows = np.flatnonzero(~absent)
    if not rows.size:
        raise InfluenceError(
            f"{WHO}: the sensitive attribute is missing in all {len(absent):,} rows; nothing is known."
        )
    answers = as_array(y, len(features), "target")[rows]
    if unanswered := int(missing(answers, below_zero=False).sum()):  # -1 and 1 are classes
        raise InfluenceError(f"{WHO}: the target is missing in {unanswered:,} rows; leave them out.")
    target = variable(answers, settings.slices, "target", CLASS_ROWS)
    groups = variable(attribute[rows], settings.slices, "sensitive attribute", GROUP_ROWS)
    origin, basis = _support(features[rows])
    reduced = (features[rows] - origin) @ basis
    _check_head(reduced.shape[1], target)
    shrinkage = _shrinkage(reduced, settings)
    ranks = _ranks(reduced, target, groups, shrinkage, settings, track)
    sizes = (ranks.target, ranks.sensitive)
    estimator = Estimator(reduced, target, groups, sizes, settings.sdr, shrinkage, ranks.shared, settings.seed)
    found = influence_of(estimator, estimator.uniform, track)
    geometry = estimator.geometry(estimator.uniform)
    arrays = {"path": _path(estimator, geometry, groups, found, settings), "directions": _directions(ranks, found)}
    arrays |= _modules(estimator, geometry, ranks, origin, basis)
    last = found.removal[:, -len(MEASURES) :]
    note_values = (int(absent.sum()), features.shape[1] - reduced.shape[1])
    return Subspaces(
        Attribution(
            NAME,
            rows,
            QUERIES,
            last[:, [MEASURES.index("gap"), MEASURES.index("loss")]].numpy(),
            checks=(_check(estimator, found),),
            settings={each.name: getattr(settings, each.name) for each in fields(FairSettings)}
            | {"shrinkage_used": shrinkage, "threshold": ranks.threshold, "groups": list(groups.names)}
            | {"target_p": ranks.target_p, "sensitive_p": ranks.sensitive_p, "target_names": list(target.names)},
            arrays={name: np.asarray(value) for name, value in arrays.items()},
            notes=tuple(_notes(arrays["path"], target, ranks, *note_values)),
            title="Fair subspaces",
            headline=f"{len(rows):,} rows, {len(groups.names)} groups · {ranks.target} directions of the target, "
            f"{ranks.sensitive} of the attribute, {ranks.shared} shared",
            legend=LEGEND,
        )
    )


def _support(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [p], and a basis [p, r] of the directions in which the features vary: dead units have none."""
    origin = x.mean(0)
    values, vectors = torch.linalg.eigh((x - origin).T @ (x - origin) / len(x))
    varies = values > CONSTANT * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    if not varies.any():
        raise InfluenceError(f"{WHO}: the features are the same for all rows; name another layer.")
    return origin, torch.eye(len(values), dtype=x.dtype) if varies.all() else vectors[:, varies]


def _check_head(features: int, target: Variable) -> None:
    unknowns = (1 + features) * len(target.names)
    if target.numbers is None and unknowns > UNKNOWNS:
        raise InfluenceError(
            f"{WHO}: a head on {features:,} features for {len(target.names)} classes has {unknowns:,} unknowns, "
            f"more than {UNKNOWNS:,}; take features=function that returns fewer, such as a fixed projection."
        )


def _shrinkage(x: Tensor, settings: FairSettings) -> float:
    n, p = x.shape
    if settings.shrinkage is not None and settings.shrinkage > 0:
        return float(settings.shrinkage)
    if p < n - 1:
        mean, root = whitening(x, x.new_full((n,), 1 / n), 0.0)
        leverage = (1 + torch.linalg.solve_triangular(root, (x - mean).T, upper=False).square().sum(0)) / n
    else:
        leverage = torch.ones(n)
    if settings.shrinkage is None:
        return ledoit_wolf(x) if 10 * p > n or leverage.max() > LEVERAGE else 0.0
    if leverage.max() > 1 - 1e-6:
        what = f"row {int(leverage.argmax())} alone varies in one of them" if p < n - 1 else f"there are {n} rows"
        raise InfluenceError(
            f"{WHO}: shrinkage=0, but {p} features vary, and {what}; leave shrinkage out, or give fewer features."
        )
    return 0.0


def _ranks(
    x: Tensor, target: Variable, groups: Variable, shrinkage: float, settings: FairSettings, track: Track
) -> _Ranks:
    n, p = x.shape
    uniform = x.new_full((n,), 1 / n)
    mean, root = whitening(x, uniform, shrinkage)
    whitened = torch.linalg.solve_triangular(root, (x - mean).T, upper=False).T
    sizes, tests = [], []
    for one, given, name in ((target, settings.target_rank, "target"), (groups, settings.sensitive_rank, "sensitive")):
        most = min(p, len(one.names) - 1) if settings.sdr == "sir" else p
        if given is not None and given > most:
            raise InfluenceError(f"{WHO}: {name}_rank={given}, but {settings.sdr!r} finds at most {most}; lower it.")
        args = (settings.sdr, settings.permutations, settings.seed, track)
        size, p_values = (given, []) if given is not None else rank(whitened, one.slices, *args)
        sizes.append(size)
        tests.append(p_values)
    if not min(sizes):
        return _Ranks(sizes[0], sizes[1], tests[0], tests[1], float("nan"), 0)

    def space(slices: Tensor, size: int) -> Tensor:
        return eigenspace(kernel(whitened, slices, uniform, settings.sdr), slice(p - size, None))

    ours, generator = space(target.slices, sizes[0]), torch.Generator().manual_seed(settings.seed + 1)
    chance = [
        _cosines(ours, space(groups.slices[torch.randperm(n, generator=generator)], sizes[1]))[0]
        for _ in track(range(PERMUTED), "cosines by chance")
    ]
    threshold = float(np.quantile(chance, QUANTILE))
    cosines = _cosines(ours, space(groups.slices, sizes[1]))
    shared = sum(cosine > min(threshold, 1 - 1e-9) for cosine in cosines)
    return _Ranks(sizes[0], sizes[1], tests[0], tests[1], threshold, shared)


def _cosines(one: Tensor, other: Tensor) -> list[float]:
    found: list[float] = torch.linalg.svdvals(one.T @ other).tolist()
    return found


def _path(
    estimator: Estimator, geometry: Geometry, groups: Variable, found: Influence, settings: FairSettings
) -> np.ndarray[Any, Any]:
    """A line for each point, in the order of COLUMNS."""
    points, size = len(estimator.keeps), len(MEASURES)
    value, error = (part[-points * size :].reshape(points, size) for part in (found.value, found.standard_error))
    error = torch.where(value.isnan(), torch.nan, error)
    p = [
        permutation_p(
            predictions(each)[estimator.sample], groups.slices[estimator.sample], settings.permutations, settings.seed
        )
        for each in estimator.outputs(geometry, estimator.uniform)
    ]
    table = np.column_stack([estimator.keeps, value.numpy(), error.numpy(), p])
    assert table.shape[1] == len(COLUMNS)
    return table


def _directions(ranks: _Ranks, found: Influence) -> np.ndarray[Any, Any]:
    """A line for each direction: number of its kind, cosine, and the ends of the cosine's 95 % interval."""
    pairs = min(ranks.target, ranks.sensitive)
    cosines = [
        (min(float(c), 1.0), float(se)) for c, se in zip(found.value[:pairs], found.standard_error[:pairs], strict=True)
    ]
    shared, others = cosines[pairs - ranks.shared :][::-1], cosines[: pairs - ranks.shared][::-1]
    of_kind = {"target": others + [(0.0, 0.0)] * (ranks.target - pairs), "shared": shared}
    of_kind["sensitive"] = others + [(0.0, 0.0)] * (ranks.sensitive - pairs)
    lines = [
        (float(k), cosine, max(cosine - Z95 * se, 0.0), min(cosine + Z95 * se, 1.0))
        for k, kind in enumerate(KINDS)
        for cosine, se in of_kind[kind]
    ]
    return np.array(lines).reshape(-1, 4)


def _modules(
    estimator: Estimator, geometry: Geometry, ranks: _Ranks, origin: Tensor, basis: Tensor
) -> dict[str, np.ndarray[Any, Any]]:
    """What projections and heads on the features as they come are made of; directions in the order of keeping."""
    kept = geometry.sensitive @ geometry.vectors[:, geometry.order(ranks.shared)]
    read = torch.linalg.solve_triangular(geometry.root.T, kept, upper=True)
    heads = []
    for keep in estimator.fitted:
        theta = estimator.head(geometry, keep, estimator.uniform)[0]
        removed = geometry.removed(keep, ranks.shared)
        slopes = theta[1:] - removed @ (removed.T @ theta[1:])
        raw = basis @ torch.linalg.solve_triangular(geometry.root.T, slopes, upper=True)
        middle = origin + basis @ geometry.mean
        heads.append(torch.cat([(theta[0] - middle @ raw)[None], raw]).T)
    return {
        "mean": (origin + basis @ geometry.mean).numpy(),
        "removed": (basis @ (geometry.root @ kept)).numpy(),
        "read": (basis @ read).numpy(),
        "heads": torch.stack(heads).numpy(),
        "heads_at": np.array(estimator.fitted, dtype=np.float64),
    }


def _check(estimator: Estimator, found: Influence) -> Check:
    """Influence values against leaving out the rows with the largest ones, and others."""
    n, size = len(found.rows), len(MEASURES)
    loss, gap, none = (
        found.removal[:, k] for k in (-size, -size + MEASURES.index("gap"), -size * len(estimator.keeps))
    )
    predicted = torch.stack([loss, gap, none], 1)
    strong = predicted.abs().argsort(0, descending=True)[: CHECKED // 6].unique().tolist()
    others = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:CHECKED].tolist()
    rows = list(dict.fromkeys([*strong, *others]))[:CHECKED]
    measured = left_out(estimator.ends, rows, n) - estimator.ends(estimator.uniform).detach()
    worst = min(agreement(predicted[rows, k], measured[:, k])[0] for k in range(3))
    remedy = "give more rows, fewer features, or more shrinkage"
    return Check(f"correlation with leaving {len(rows)} rows out", worst, f"above {AGREES}", worst > AGREES, remedy)


def _notes(path: np.ndarray[Any, Any], target: Variable, ranks: _Ranks, absent: int, constant: int) -> list[str]:
    notes = [f"{absent:,} rows have no sensitive attribute and are left out"] if absent else []
    if constant:
        notes.append(f"features do not vary in {constant} of their directions, which are left out")
    if not ranks.sensitive:
        notes.append("no direction tells about the sensitive attribute, so nothing is left out")
    if not ranks.target:
        notes.append("no direction tells about the target")
    usual = float(target.counts.max() / target.counts.sum()) if target.numbers is None else 0.0
    if path[0, COLUMNS.index("accuracy")] < usual + 0.01:
        notes.append("without the attribute's directions nothing is left that predicts the target")
    return notes
