"""Data values against recomputing the objective, rows that come and go, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ine_callback.errors import InfluenceError
from ine_callback.methods.kairos.settings import KAIROSSettings
from ine_callback.methods.kairos.values import DataValues, kairos

N, M, SIGMA, LAM = 60, 40, 2.0, 0.9


def data(n: int = N, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Training rows, a fifth of them moved and mislabelled, and a clean reference; three classes."""
    rng = np.random.default_rng(seed)
    x, v = rng.normal(size=(n, 4)), rng.normal(size=(M, 4))
    y, yv = x[:, :3].argmax(1), v[:, :3].argmax(1)
    y[: n // 5] = (y[: n // 5] + 1) % 3
    x[: n // 10] += 1.5
    return x, y, v, yv


def objective(x: Any, y: Any, v: Any, found: DataValues, lam: float = LAM) -> float:
    """J from whole matrices; the label model is the reference's, which leaving rows out does not touch."""

    def k(a: Any, b: Any) -> Any:
        return np.exp(-np.square(a[:, None] - b[None]).sum(-1) / (2 * SIGMA**2))

    mmd2 = k(x, x).mean() - 2 * k(x, v).mean() + k(v, v).mean()
    if lam == 1:
        return float(mmd2 / 2)
    assert found._labels is not None
    from ine_callback.stats.logistic import probabilities

    p = probabilities(x - v.mean(0), found._labels._weights, found._labels._bias)
    return float(lam / 2 * mmd2 + (1 - lam) * np.linalg.norm(np.eye(3)[y] - p, axis=1).mean())


@pytest.mark.parametrize("lam", [1.0, LAM, 0.0])
def test_a_value_is_what_leaving_the_row_out_does(lam: float) -> None:
    x, y, v, yv = data()
    found = kairos(x, y, v, yv, sigma=SIGMA, lam=lam)
    base = objective(x, y, v, found, lam)
    each = [objective(np.delete(x, i, 0), np.delete(y, i), v, found, lam) - base for i in range(N)]
    assert np.abs(found.values - (N - 1) * np.array(each)).max() < 1e-12
    assert all(found.group([i]) == pytest.approx(found.values[i], abs=1e-12) for i in (0, 7, N - 1))


def test_first_order_values_are_the_published_ones_up_to_a_constant() -> None:
    x, y, v, yv = data()
    found = kairos(x, y, v, yv, sigma=SIGMA, lam=LAM, loo=False)
    k = np.exp(-np.square(x[:, None] - np.concatenate([x, v])[None]).sum(-1) / (2 * SIGMA**2))
    assert found._labels is not None
    _, residual = found._labels.residuals(x - v.mean(0), y)
    metric = LAM * (k[:, :N].mean(1) - k[:, N:].mean(1)) + (1 - LAM) * residual
    assert np.ptp(found.values + metric) < 1e-13
    assert abs(found.values.mean()) < 1e-13 and abs(found.features.mean()) < 1e-13


@given(group=st.sets(st.integers(0, N - 1), min_size=1, max_size=N - 2))
@settings(max_examples=25, deadline=None)
def test_a_groups_value_is_what_leaving_it_out_does(group: set[int]) -> None:
    x, y, v, yv = data()
    found = kairos(x, y, v, yv, sigma=SIGMA, lam=LAM)
    keep = np.setdiff1d(np.arange(N), sorted(group))
    change = objective(x[keep], y[keep], v, found) - objective(x, y, v, found)
    assert found.group(sorted(group)) == pytest.approx(len(keep) * change, abs=1e-11)


def test_groups_are_not_sums_of_their_rows() -> None:
    """A clump of copies: without one of them little changes, without all of them much."""
    x, _, v, _ = data()
    x[:12] = x[0]
    found = kairos(x, None, v, None, sigma=SIGMA, lam=1)
    assert np.ptp(found.values[:12]) < 1e-15  # copies have one value
    assert abs(found.group(range(12)) - found.values[:12].sum()) > 0.1 * abs(found.group(range(12)))


@pytest.mark.parametrize("random_features", [None, 64])
def test_rows_that_come_and_go_leave_the_values_of_the_rest(random_features: int | None) -> None:
    x, y, v, yv = data()
    options: dict[str, Any] = {"sigma": SIGMA, "lam": LAM, "random_features": random_features}
    whole = kairos(x, y, v, yv, **options)
    online = kairos(x[:23], y[:23], v, yv, **options).update(x[23:50], y[23:50]).update(x[50:], y[50:])
    for one, other in [
        (online.values, whole.values),
        (online.conformal_p(), whole.conformal_p()),
        (np.array([online.mmd2]), np.array([whole.mmd2])),
    ]:
        assert np.abs(one - other).max() < 1e-12
    gone = [3, 40, 17]
    rest = np.setdiff1d(np.arange(N), gone)
    less, anew = online.remove(gone), kairos(x[rest], y[rest], v, yv, **options)
    assert less.rows.tolist() == rest.tolist()
    assert np.abs(less.values - anew.values).max() < 1e-12
    assert less.group([4, 50]) == pytest.approx(
        anew.group([int(np.searchsorted(rest, 4)), int(np.searchsorted(rest, 50))]), abs=1e-12
    )
    again = less.update(x[gone], y[gone])
    assert again.rows.tolist() == [*rest.tolist(), N, N + 1, N + 2]  # ids are not used twice
    assert np.abs(again.values - whole.values[[*rest, *gone]]).max() < 1e-12
    assert again.update(x[:1] + 1, y[:1]).rows[-1] == N + 3


def test_the_order_of_rows_makes_no_difference() -> None:
    x, y, v, yv = data()
    order = np.random.default_rng(3).permutation(N)
    one, other = (kairos(x[o], y[o], v, yv, sigma=SIGMA) for o in (np.arange(N), order))
    assert np.abs(one.values[order] - other.values).max() < 1e-13


def test_moving_all_features_makes_no_difference() -> None:
    x, y, v, yv = data()
    one, other = kairos(x, y, v, yv), kairos(x + 1e4, y, v + 1e4, yv)
    assert np.abs(one.values - other.values).max() < 1e-8 and one.sigma == pytest.approx(other.sigma)


def test_harm_is_negative_in_both_parts() -> None:
    x, y, v, yv = data(300)
    found = kairos(x, y, v, yv)
    assert found.labels is not None
    wrong, moved = np.arange(300) < 60, np.arange(300) < 30
    assert found.labels[wrong].mean() < 0 < found.labels[~wrong].mean()
    assert found.features[moved].mean() < found.features[~moved].mean()
    assert found.values[wrong].mean() < 0 < found.values[~wrong].mean()


def test_an_attribution_holds_parts_and_settings() -> None:
    x, y, v, yv = data()
    found = kairos(x, y, v, yv, lam=LAM)
    made = found.attribution("clean")
    assert made.scores[:, 0] == pytest.approx(LAM * made.features[:, 0] + (1 - LAM) * made.labels[:, 0])
    assert made.settings["sigma"] == "median" and made.settings["sigma_used"] == found.sigma
    assert made.queries[0].name == "clean" and made.p is None and made.conformal_p.min() > 0
    assert set(kairos(x, None, v, None, lam=1).attribution().columns) == {"features", "conformal_p"}


@pytest.mark.parametrize("sigma", [1.0, "median"])
def test_p_values_of_a_row_like_the_reference_are_uniform(sigma: Any) -> None:
    """Beside nine rows of another kind; with M = 38, on {1, …, 20}/20."""
    rng, found = np.random.default_rng(0), []
    for _ in range(1500):
        x, v = rng.normal(size=(10, 2)), rng.normal(size=(38, 2))
        x[1:] += 2
        found.append(kairos(x, None, v, None, lam=1, sigma=sigma).conformal_p()[0])
    smooth = np.array(found) - rng.random(1500) / 20  # uniform on [0, 1] for a uniform discrete law
    assert stats.kstest(smooth, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.017)


def test_too_few_random_features_are_noticed() -> None:
    x, _, v, _ = data()
    few, many = (kairos(x, None, v, None, lam=1, random_features=d).attribution() for d in (2, 4096))
    assert not few.reliable and "random_features" in " ".join(few.reasons)
    assert all(check.passed for check in many.checks if "random" in check.name)


def test_classes_that_the_reference_lacks_are_doubtful() -> None:
    x, y, v, yv = data()
    y[5] = 7
    with pytest.warns(UserWarning, match="1 rows have a class that the reference lacks"):
        found = kairos(x, y, v, yv).attribution()
    assert found.doubtful is not None and np.flatnonzero(found.doubtful).tolist() == [5]
    assert any("lacks" in note for note in found.notes)


def test_labels_may_be_texts_and_tensors() -> None:
    x, y, v, yv = data()
    names = np.array(["cat", "dog", "gnu"])
    plain = kairos(x, y, v, yv).values
    assert np.array_equal(kairos(x, names[y].tolist(), v, names[yv].astype(object), lam=0.97).values, plain)
    as_tensors = [torch.tensor(each) for each in (x, y, v, yv)]
    assert np.array_equal(kairos(*as_tensors).values, plain)
    assert np.array_equal(kairos(x, y.astype(float), v, yv).values, plain)


X, Y, V, YV = data()
NAN = X.copy()
NAN[[4, 9], 1] = [np.nan, np.inf]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X, Y, V[:1], YV[:1]), "the reference has 1 row; give at least 2"),
        ((NAN, Y, V, YV), "training row 4, 9 has features that are NaN or infinite"),
        ((X, Y, NAN[:M], YV), "reference row 4, 9 has features that are NaN"),
        ((X, Y, np.ones((M, 4)), YV), "features are constant"),
        ((X, None, V, YV), "training rows have no labels.*lam=1"),
        ((X, Y, V, None), "reference rows have no labels"),
        ((X, Y + 0.5, V, YV), "labels of training rows are float64.*lam=1"),
        ((X, Y[:-1], V, YV), "one class for each of the 60"),
        ((X, np.eye(3)[Y], V, YV), r"shape \(60, 3\)"),
        ((X, Y.astype(str), V, YV), "use one kind for both"),
        ((X[:, :3], Y, V, YV), "training rows have 3 features, the reference 4"),
        ((X[:, 0], Y, V, YV), r"have the shape \(60,\)"),
        ((X[:0], Y[:0], V, YV), "at least one"),
        (("abc", Y, V, YV), "no array of numbers"),
        ((np.concatenate([X, V[3:5]]), np.append(Y, [0, 0]), V, YV), "rows 60, 61 are in the reference too"),
    ],
)
def test_bad_data_is_refused(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InfluenceError, match=f"KAIROS: .*{message}"):
        kairos(*given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0}, "sigma=0 is no bandwidth"),
        ({"sigma": "mean"}, "sigma='mean'"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"sigma": True}, "sigma=True"),
        ({"lam": 1.5}, "lam=1.5 must be between 0"),
        ({"random_features": 0}, "random_features=0 must be"),
        ({"random_features": 2.0}, "random_features=2.0 must be"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        KAIROSSettings(**options)


def test_bad_rows_are_refused() -> None:
    found = kairos(X, Y, V, YV)
    with pytest.raises(InfluenceError, match="leaves no two"):
        found.remove(range(N - 1))
    with pytest.raises(InfluenceError, match="leaves no two"):
        found.group(range(N - 1))
    with pytest.raises(KeyError, match="no row 60"):
        found.group([N])
    with pytest.raises(ValueError, match="more than once"):
        found.group([1, 1])
    with pytest.raises(KeyError, match="row 2 was removed"):
        found.remove([2]).remove([2])
    with pytest.raises(InfluenceError, match="rows 1 are in the reference"):
        found.update(np.stack([X[0], V[0]]), [0, 0])
    with pytest.raises(InfluenceError, match="0 training rows have no values"):
        _ = DataValues(V, YV, KAIROSSettings()).values
