"""AirRep's mathematics: pooling, targets, ranking loss, gradient cache, data-modelling score, by hand and by loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ine_callback.methods.airrep.evaluate import Evaluation, intervals, lds, noise_ceiling
from ine_callback.methods.airrep.ranking import pairwise_loss, pooled, targets
from ine_callback.methods.airrep.training import backward, ranking

POOLINGS: Any = pytest.mark.parametrize("pooling", ["attention", "mean"])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@POOLINGS
def test_pooled_scores_are_those_of_loops(pooling: Any) -> None:
    queries, subsets = drawn(0, 3, 4), drawn(1, 5, 6, 4)
    found = pooled(queries, subsets, pooling)
    for q, query in enumerate(queries):
        for m, subset in enumerate(subsets):
            scores = [float(query @ row) for row in subset]
            weights = [math.exp(abs(s)) if pooling == "attention" else 1.0 for s in scores]
            pooled_row = sum(w * row for w, row in zip(weights, subset, strict=True)) / sum(weights)
            assert float(found[q, m]) == pytest.approx(float(query @ pooled_row), abs=1e-12)


@POOLINGS
@given(seed=st.integers(0, 1000), n=st.integers(1, 9))
def test_the_order_of_a_subset_is_nothing(pooling: Any, seed: int, n: int) -> None:
    queries, subsets = drawn(seed, 3, 4), drawn(seed + 1, 2, n, 4)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert (pooled(queries, subsets[:, order], pooling) - pooled(queries, subsets, pooling)).abs().max() < 1e-6


@POOLINGS
def test_a_subset_of_one_row_scores_its_dot_product(pooling: Any) -> None:
    queries, rows = drawn(0, 3, 4), drawn(1, 5, 4)
    assert (pooled(queries, rows[:, None], pooling) - queries @ rows.T).abs().max() < 1e-12


def test_mean_pooling_is_linear_and_attention_is_not() -> None:
    queries, subsets, r = drawn(0, 7, 4), drawn(1, 20, 6, 4), drawn(2, 7, 20).numpy()
    sums = torch.einsum("qd,mnd->qm", queries, subsets)
    assert (6 * pooled(queries, subsets, "mean") - sums).abs().max() < 1e-12
    assert lds(pooled(queries, subsets, "mean").numpy(), r) == pytest.approx(lds(sums.numpy(), r), abs=1e-12)
    assert (6 * pooled(queries, subsets, "attention") - sums).abs().max() > 0.1


def test_targets_are_standardised_signed_and_clipped() -> None:
    losses = drawn(0, 3, 50) * 3 + 7
    losses[1] = 2.0
    losses[2, 0] = 1e6
    found = targets(losses)
    assert found[0].mean() == pytest.approx(0, abs=1e-12) and found[0].std() == pytest.approx(1)
    assert found[0].argmax() == losses[0].argmin()  # the lowest loss is of the most helpful subset
    assert not found[1].any() and found.abs().max() <= 10


def test_the_ranking_loss_is_that_of_a_loop() -> None:
    scores, r = drawn(0, 3, 12), 4 * drawn(1, 3, 12)
    terms = [
        min(float(r[q, i] - r[q, j]), 5.0) * math.log1p(math.exp(-float(scores[q, i] - scores[q, j])))
        for q in range(3)
        for i in range(12)
        for j in range(12)
        if r[q, i] - r[q, j] > 0.1
    ]
    assert max(float(r[q].max() - r[q].min()) for q in range(3)) > 5  # so that the weight's bound is met
    assert float(pairwise_loss(scores, r)) == pytest.approx(np.mean(terms), rel=1e-12)


@given(seed=st.integers(0, 1000))
def test_reversed_scores_cost_more_than_none_and_right_ones_less(seed: int) -> None:
    r = torch.arange(8.0, dtype=torch.float64)[torch.randperm(8, generator=torch.Generator().manual_seed(seed))][None]
    weight = torch.stack([(a - b).clamp(max=5) for a in r[0] for b in r[0] if a - b > 0.1]).mean()
    right, none, wrong = (float(pairwise_loss(f, r) / weight) for f in (r, 0 * r, -r))
    assert right < math.log(2) < wrong and none == pytest.approx(math.log(2))


def test_targets_that_do_not_differ_cost_nothing() -> None:
    scores = drawn(0, 2, 5).requires_grad_()
    loss = pairwise_loss(scores, torch.full((2, 5), 0.3))
    loss.backward()
    assert float(loss.detach()) == 0 and not scores.grad.any()  # type: ignore[union-attr]


@POOLINGS
def test_the_gradient_cache_gives_autograds_gradient(pooling: Any) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 4)).double().eval()
    queries, rows = drawn(0, 6, 5), drawn(1, 23, 5)
    places = torch.randint(0, 23, (8, 7), generator=torch.Generator().manual_seed(2))
    loss_of = ranking(6, places, drawn(3, 6, 8), pooling)
    found = []
    for cached, parts in ((False, [queries, rows]), (True, [queries, *rows.split(4)])):
        encoder.zero_grad()
        loss = backward(encoder, parts, loss_of, cached)
        found.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None] + [torch.tensor(loss)])
    assert len(found[0]) == 5 and found[0][0].abs().max() > 1e-3
    for whole, by_parts in zip(*found, strict=True):
        assert (whole - by_parts).abs().max() <= 1e-6 * whole.abs().max()


# -- the score ---------------------------------------------------------------------------------------------------------


def test_the_label_itself_scores_one_and_its_negative_minus_one() -> None:
    r = drawn(0, 9, 40).numpy()
    assert lds(r, r) == pytest.approx(1, abs=1e-12) and lds(-r, r) == pytest.approx(-1, abs=1e-12)
    assert lds(np.exp(r), r) == pytest.approx(1, abs=1e-12)  # ranks alone count
    assert lds(np.zeros_like(r), r) == 0


def test_scores_of_nothing_score_nothing() -> None:
    assert abs(lds(drawn(0, 200, 100).numpy(), drawn(1, 200, 100).numpy())) < 0.05


def test_intervals_hold_the_score_and_the_gain() -> None:
    r = drawn(0, 40, 60).numpy()
    good, poor = r + drawn(1, 40, 60).numpy(), r + 5 * drawn(2, 40, 60).numpy()
    of_good, of_gain = intervals(good, poor, r, 0)
    assert of_good[0] < lds(good, r) < of_good[1] and 0.02 < of_good[1] - of_good[0] < 0.2
    assert of_gain[0] > 0.3 and intervals(poor, poor, r, 0)[1] == (0, 0)


def test_the_ceiling_is_what_the_expected_losses_score() -> None:
    """Expected losses with noise of the same size, k seeds: their mean's reliability is k/(k + 1)."""
    expected = drawn(0, 400, 1, 60).numpy()
    for seeds in (2, 5):
        losses = expected + drawn(seeds, 400, seeds, 60).numpy()
        truth = lds(expected[:, 0].T, losses.mean(1).T)
        assert noise_ceiling(losses) == pytest.approx(truth, abs=0.02)
    assert noise_ceiling(losses[:, :1]) == 1
    assert math.isnan(noise_ceiling(np.stack([expected[:, 0], -expected[:, 0]], 1)))


def test_an_evaluation_says_whether_training_gained_anything() -> None:
    found = Evaluation(0.3, (0.2, 0.4), 0.1, (0.01, 0.3), 0.2, math.nan, 5, 6, 0)
    assert found.usable and not Evaluation(0.3, (0.2, 0.4), 0.1, (-0.01, 0.3), 0.2, 1.0, 5, 6, 0).usable
    assert "seeds do not agree" in str(found) and "[0.200, 0.400]" in str(found)


def world(seed: int, queries: int, subsets: int) -> tuple[Any, Any, Any]:
    """Losses of queries and subsets with common causes, and a good and a poor prediction of them [Q, M]."""
    rng = np.random.default_rng(seed)
    u, w = rng.normal(size=(5, subsets)), rng.normal(size=(queries, 5))
    noise = [rng.normal(size=w.shape) for _ in range(2)]
    return w @ u + 0.8 * rng.normal(size=(queries, subsets)), (w + 0.8 * noise[0]) @ u, (w + 2 * noise[1]) @ u


@pytest.mark.long
def test_intervals_cover_what_endless_queries_and_subsets_would_score() -> None:
    truth, good, poor = world(0, 1500, 1500)
    whole = lds(good, truth)
    gain = whole - lds(poor, truth)
    covered = np.zeros(2)
    for seed in range(1, 101):
        truth, good, poor = world(seed, 30, 40)
        (low, high), (least, most) = intervals(good, poor, truth, seed)
        covered += low <= whole <= high, least <= gain <= most
    assert (covered >= 88).all(), covered  # 95 expected; fewer than 88 in 2 of 1,000 such tests
