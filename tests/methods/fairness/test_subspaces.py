"""Fair subspaces without training: closed forms, LEACE, leaving rows out, what must not depend on what, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ine_callback import FairSettings, Subspaces, fair_subspaces
from ine_callback.errors import InfluenceError
from ine_callback.methods.fairness import measures
from ine_callback.methods.fairness.estimator import MEASURES, Estimator
from ine_callback.methods.fairness.inputs import Variable, variable
from ine_callback.scores import example_attribution
from ine_callback.stats.influence_of import agreement, influence_of, left_out

Array = Any
QUICK = FairSettings(permutations=39)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Modules of float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(n: int = 300, p: int = 6, seed: int = 0) -> tuple[Array, Array, Array]:
    """Features, a class that direction 0 and 1 tell, and three groups that 0 and 2 tell."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    y = (x[:, 0] + x[:, 1] + 0.5 * rng.normal(size=n) > 0).astype(int)
    z = np.where(x[:, 0] > 0.3, 1, np.where(x[:, 2] + 0.3 * rng.normal(size=n) > 0, 2, 0))
    return x @ rng.normal(size=(p, p)), y, z


def estimator(x: Array, y: Array, z: Array, ranks: tuple[int, int], shared: int) -> Estimator:
    target, groups = variable(np.asarray(y), 10, "target", 1), variable(np.asarray(z), 10, "attribute", 1)
    return Estimator(torch.tensor(x), target, groups, ranks, "sir", 0.0, shared)


def test_the_trade_off_of_gaussian_features_is_the_closed_form() -> None:
    n, rng = 400_000, np.random.default_rng(0)
    u = rng.normal(size=(n, 4))
    z = (u[:, 0] + 0.5 * rng.normal(size=n) > 0).astype(int)
    y = u @ np.array([0.8, 1.0, 0.0, 0.0]) + rng.normal(size=n)
    each = estimator(u, y, z, (1, 1), 1)
    found = torch.stack(each(each.uniform))[1:].reshape(-1, len(MEASURES)).numpy()
    share = np.array(each.keeps)
    assert share.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found[:, 0] - 1 == pytest.approx((1 - share) ** 2 * 0.64, abs=0.01)
    assert found[:, 2] == pytest.approx(share * 0.8 * 2 * np.sqrt(2 / np.pi) / np.sqrt(1.25), abs=0.01)
    assert (np.diff(found[:, 0]) < 0).all() and (np.diff(found[:, 2]) > 0).all()


def leace(x: Array, z: Array) -> Array:
    """x without what tells about the groups linearly: x − W⁻¹ P W (x − μ), W = Σ^(−1/2), P onto col(W Σ_xz)."""
    centred, hot = x - x.mean(0), np.eye(z.max() + 1)[z]
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    white = vectors @ np.diag(values**-0.5) @ vectors.T
    left, size, _ = np.linalg.svd(white @ (centred.T @ (hot - hot.mean(0)) / len(x)), full_matrices=False)
    basis = left[:, size > 1e-10]
    return x - centred @ white.T @ basis @ basis.T @ np.linalg.inv(white).T


def test_full_removal_is_leace() -> None:
    x, y, z = problem()
    found = fair_subspaces(x, y, z, FairSettings(permutations=39, sensitive_rank=2))
    removed = found.projection(keep=0)(torch.tensor(x)).numpy()
    assert np.abs(removed - leace(x, z)).max() < 1e-10
    means = np.stack([removed[z == k].mean(0) for k in range(3)])
    assert np.abs(means - means[0]).max() < 1e-12


def test_full_removal_is_what_concept_erasure_does() -> None:
    x, y, z = problem()
    peer = pytest.importorskip("concept_erasure", reason="needs concept-erasure, of the extra peers")
    found = fair_subspaces(x, y, z, FairSettings(permutations=39, sensitive_rank=2))
    removed = found.projection(keep=0)(torch.tensor(x)).numpy()
    one_hot = torch.eye(3)[torch.tensor(z)]
    theirs = peer.LeaceEraser.fit(torch.tensor(x), one_hot, shrinkage=False, svd_tol=1e-9)(torch.tensor(x))
    assert np.abs(removed - theirs.numpy()).max() < 1e-10


def test_projections_keep_what_they_are_told() -> None:
    x, y, z = problem()
    found = fair_subspaces(x, y, z, QUICK)
    rows = torch.tensor(x)
    most = sum(each.kind != "target" for each in found.directions)
    assert (found.projection(keep=most)(rows) - rows).abs().max() < 1e-12
    one = found.projection(keep=1)
    assert (one(one(rows)) - one(rows)).abs().max() < 1e-10
    lost = [float((found.projection(keep=k)(rows) - rows).square().sum()) for k in (0, 0.5, 1, most)]
    assert lost == sorted(lost, reverse=True)
    assert set(found.projection(keep=0).state_dict()) == {"mean", "removed", "read"}
    with pytest.raises(ValueError, match=f"keep={most + 1} is not between 0 and {most}"):
        found.projection(keep=most + 1)
    with pytest.raises(ValueError, match="keep=-1"):
        found.head(keep=-1)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_path_is_what_its_heads_do(kind: str) -> None:
    x, y, z = problem()
    y = y if kind == "classes" else y + 0.3 * x[:, 3]
    found = fair_subspaces(x, y, z, QUICK)
    hot = torch.eye(3)[torch.tensor(z)]
    target = torch.eye(2)[torch.tensor(y)] if kind == "classes" else torch.tensor(y)
    weights = torch.full((len(x),), 1 / len(x))
    assert len(found.path) > 4
    for point in found.path:
        outputs = found.head(point.keep)(torch.tensor(x)).detach()
        assert point.loss == pytest.approx(float(measures.loss(outputs, target, weights)), abs=1e-10)
        assert point.gap == pytest.approx(float(measures.gap(measures.scores(outputs), hot, weights)), abs=1e-10)
    assert found.choose(gap=1.0).keep == found.path[-1].keep
    with pytest.raises(ValueError, match="no point has a gap up to -1"):
        found.choose(gap=-1)


def test_gaps_by_hand() -> None:
    predicted = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.5, 0.5]]).repeat(10, 1)
    groups, slices = torch.eye(3)[[0, 0, 1, 1, 2]].repeat(10, 1), torch.eye(2)[[0, 1, 0, 1, 1]].repeat(10, 1)
    weights = torch.full((50,), 0.02)
    assert float(measures.gap(predicted, groups, weights)) == pytest.approx(0.8 - 0.3)
    assert float(measures.equalised_odds(predicted, groups, slices, weights)) == pytest.approx(0.7)  # within class 0
    assert float(measures.gap(predicted[:, :1], groups, weights)) == pytest.approx(0.5)
    assert torch.isnan(measures.equalised_odds(predicted, groups, groups, weights))


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_influence_values_predict_rows_left_out(kind: str) -> None:
    x, y, z = problem(400)
    y = y if kind == "classes" else y + 0.3 * x[:, 3]
    each = estimator(x, y, z > 0, (1, 1), 1)
    found = influence_of(each, each.uniform)
    assert found.rows.mean(0).abs().max() < 1e-12
    rows = list(range(0, 400, 10))
    measured = left_out(each, rows, 400) - found.value
    smooth = [0, *(1 + 5 * k + MEASURES.index(m) for k in range(len(each.points)) for m in ("loss", "gap", "dcov"))]
    for k in smooth:
        if float(measured[:, k].abs().max()) > 1e-9:  # without the attribute a regression's gap is 0
            correlation, slope = agreement(found.removal[rows, k], measured[:, k])
            assert correlation > 0.995 and 0.93 < slope < 1.07, (k, correlation, slope)


def test_scores_are_the_changes_without_the_rows() -> None:
    x, y, z = problem()
    found = fair_subspaces(x, y, z, QUICK).attribution
    assert [query.name for query in found.queries] == ["fair/gap", "fair/risk"] and found.reliable
    row = int(found.top(1, "fair/risk")[0])
    keep = np.arange(len(x)) != row
    ranks = found.settings["shrinkage_used"], FairSettings(permutations=39, target_rank=1, sensitive_rank=2)
    change = [fair_subspaces(x[k], y[k], z[k], ranks[1]).path[-1].loss for k in (keep, np.ones(len(x), dtype=bool))]
    assert change[0] - change[1] == pytest.approx(found.scores[row, 1], rel=0.1)
    assert found.scores[row, 1] > 0


@pytest.mark.long
def test_independent_attributes_share_nothing() -> None:
    shared = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(100, 3))
        y, z = (x[:, 0] > 0).astype(int), rng.permutation(np.arange(100) % 2)
        found = fair_subspaces(x, y, z, FairSettings(permutations=39, target_rank=1, seed=seed))
        shared.append(any(each.kind == "shared" for each in found.directions))
    assert sum(shared) <= 2  # 5 %


@pytest.mark.parametrize("groups", [2, 3])
def test_the_attribute_itself_shares_everything(groups: int) -> None:
    x, _, z = problem()
    z = np.minimum(z, groups - 1)
    found = fair_subspaces(x, z, z, QUICK)
    assert {each.kind for each in found.directions} == {"shared"} and len(found.directions) == groups - 1
    assert all(each.cosine == pytest.approx(1) for each in found.directions)
    assert any("nothing is left that predicts" in note for note in found.attribution.notes)
    assert np.isnan(found.path[0].odds) and np.isnan(found.path[0].odds_se) and np.isfinite(found.path[0].gap_se)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_coordinates_and_the_order_of_rows_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y, z = problem(200, 4, seed)
    order = rng.permutation(200)
    mixed = (x @ (rng.normal(size=(4, 4)) + 3 * np.eye(4)) + rng.normal(size=4))[order]
    ranks = FairSettings(permutations=19, target_rank=1, sensitive_rank=2)
    one, other = fair_subspaces(x, y, z, ranks), fair_subspaces(mixed, y[order], z[order], ranks)
    if len(one.path) == len(other.path):  # the threshold of cosines is drawn
        for a, b in zip(one.path, other.path, strict=True):
            assert (a.loss, a.gap, a.gap_se) == pytest.approx((b.loss, b.gap, b.gap_se), abs=1e-7)
        assert one.attribution.scores[order] == pytest.approx(other.attribution.scores, abs=1e-8)


def test_dead_features_are_left_out_and_change_nothing() -> None:
    x, y, z = problem()
    plain = fair_subspaces(x, y, z, QUICK)
    wide = fair_subspaces(np.concatenate([x, np.ones((300, 2)), x[:, :1]], 1), y, z, QUICK)
    assert "features do not vary in 3 of their directions, which are left out" in wide.attribution.notes
    assert [p.loss for p in wide.path] == pytest.approx([p.loss for p in plain.path], abs=1e-9)
    assert wide.projection(keep=0)(torch.ones(1, 9)).shape == (1, 9)


def test_a_feature_of_a_single_row_is_shrunk() -> None:
    x, y, z = problem()
    wide = np.concatenate([x, np.eye(300)[:, 5:6]], 1)
    with pytest.raises(InfluenceError, match="7 features vary, and row 5 alone varies in one of them"):
        fair_subspaces(wide, y, z, FairSettings(shrinkage=0))
    found = fair_subspaces(wide, y, z, QUICK).attribution
    assert found.settings["shrinkage_used"] > 0 and found.reliable
    assert fair_subspaces(x, y, z, QUICK).attribution.settings["shrinkage_used"] == 0


def test_rows_without_the_attribute_are_left_out_and_counted() -> None:
    x, y, z = problem()
    known = np.arange(300) >= 7
    whole = fair_subspaces(x[known], y[known], z[known], QUICK)
    for unknown in (np.where(known, z, -1), np.where(known, z, np.nan), np.where(known, z.astype(object), None)):
        found = fair_subspaces(x, y, unknown, QUICK)
        assert [p.loss for p in found.path] == [p.loss for p in whole.path]
        assert found.attribution.rows.tolist() == list(range(7, 300))
        assert "7 rows have no sensitive attribute and are left out" in found.attribution.notes


def test_classes_may_be_called_minus_one_and_one() -> None:
    x, y, z = problem()
    assert fair_subspaces(x, 2 * y - 1, z, QUICK).path == fair_subspaces(x, y, z, QUICK).path


def test_numbers_are_sliced() -> None:
    x, y, _ = problem()
    found = fair_subspaces(x, y, x[:, 0] + 0.1, FairSettings(slices=4, permutations=39))
    assert found.attribution.settings["groups"] == [f"slice {k}" for k in (1, 2, 3, 4)]


X, Y, Z = problem(120, 4)


@pytest.mark.parametrize(
    ("x", "y", "z", "message"),
    [
        (X, Y, None, "the sensitive attribute is missing; name it"),
        (X, Y, np.full(120, np.nan), "missing in all 120 rows"),
        (X, Y, np.ones(120), "the sensitive attribute is the same for all 120 rows"),
        (X, Y, (np.arange(120) < 29).astype(int), "'1' of the sensitive attribute has 29 rows, fewer than 30"),
        (X, np.ones(120), Z, "the target is the same"),
        (X, np.where(np.arange(120) < 3, np.nan, 1.0 + Y), Z, "the target is missing in 3 rows"),
        (X, (np.arange(120) < 4).astype(int), Z, "'1' of the target has 4 rows, fewer than 10"),
        (X, Y, Z[:50], r"shape \(50,\); give one class or number for each of the 120 rows"),
        (np.ones((120, 3)), Y, Z, "the features are the same for all rows"),
        (np.where(np.arange(480).reshape(120, 4) == 9, np.nan, X), Y, Z, "training row 2 has features that are NaN"),
    ],
)  # fmt: skip
def test_bad_input_is_named(x: Array, y: Array, z: Array, message: str) -> None:
    with pytest.raises(InfluenceError, match=f"FairSubspaces: .*{message}"):
        fair_subspaces(x, y, z)


def test_more_features_than_rows_need_shrinkage() -> None:
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(80, 100)), np.arange(80) % 2
    y = (x[:, 0] > 0).astype(int)
    with pytest.raises(InfluenceError, match="shrinkage=0, but 79 features vary, and there are 80 rows"):
        fair_subspaces(x, y, z, FairSettings(shrinkage=0))
    assert fair_subspaces(x, y, z, QUICK).attribution.settings["shrinkage_used"] > 0.1
    with pytest.raises(InfluenceError, match="sensitive_rank=2, but 'sir' finds at most 1"):
        fair_subspaces(x, y, z, FairSettings(sensitive_rank=2))


def test_a_head_too_large_to_differentiate_is_refused() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(700, 640)), np.arange(700) % 10
    with pytest.raises(InfluenceError, match=r"640 features for 10 classes has 6,410 unknowns.*features=function"):
        fair_subspaces(x, y, np.arange(700) % 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slices": 1}, "slices=1 must be a number of at least 2"),
        ({"permutations": 5}, "permutations=5 must"),
        ({"target_rank": 0}, "target_rank=0 must be a number of at least 1, or None"),
        ({"shrinkage": 2}, "shrinkage=2 must be between 0 and 1"),
    ],
)
def test_bad_settings_are_named(options: Any, message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        FairSettings(**options)


def test_other_attributions_hold_no_subspaces() -> None:
    with pytest.raises(ValueError, match="attribution by 'example' holds no subspaces"):
        Subspaces(example_attribution())


def test_slices_of_a_variable() -> None:
    found = variable(np.array([0.5, 1.5, 2.5, 3.5]), 2, "target", 1)
    assert isinstance(found, Variable) and found.numbers is not None
    assert found.slices.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    texts = variable(np.array(["b", "a", "b", None], dtype=object)[:3], 2, "target", 1)
    assert texts.names == ("a", "b") and texts.numbers is None and texts.counts.tolist() == [1, 2]


def test_save_sees_a_spread_that_sir_does_not() -> None:
    rng = np.random.default_rng(1)
    z = np.arange(300) % 2
    x = rng.normal(size=(300, 3)) * np.stack([1 + 2 * z, np.ones(300), np.ones(300)], 1)
    y = (x[:, 1] > 0).astype(int)
    kinds = {how: fair_subspaces(x, y, z, FairSettings(sdr=how, permutations=19)).directions for how in ("sir", "save")}  # type: ignore[arg-type]
    assert [each.kind for each in kinds["sir"]] == ["target"]
    assert sorted(each.kind for each in kinds["save"]) == ["sensitive", "target"]
