"""Scores of the terms of a row's loss, pairs that say little, and ranking by correlation."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import BIF, BIFScores, CallableQuery, EachRow, InfluenceReport, bif_scores, calibrate
from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.row_losses import row_losses
from ine_callback.methods.bif.scores import attribution, example_bif_scores
from ine_callback.report import example_report
from ine_callback.report.attribution_view import ends, legend
from ine_callback.utilities.isolation import isolated
from tests.helpers.bif.quadratic import Point

ROWS, TERMS, VOCABULARY = 9, 4, 5


def straight(module: Any, batch: Tensor) -> Tensor:
    """Terms a · w for rows [b, T, P]."""
    out: Tensor = batch @ module.w
    return out


def cube(found: BIFScores) -> np.ndarray:
    """Scores of terms [R, T, Q] of rows that all have as many."""
    assert found.tokens is not None
    return np.stack([found.tokens.of(k) for k in range(len(found.rows))])


def test_terms_of_straight_losses_are_exact() -> None:
    """Losses a · w have covariance aᵀ a′ / γ: the control variate has exactly this covariance, so no noise is left."""
    g = torch.Generator().manual_seed(0)
    rows, query = torch.randn(ROWS, TERMS, 6, generator=g), torch.randn(3, 6, generator=g)
    queries = {f"q{k}": CallableQuery(lambda module, batch: (batch @ module.w).sum(), query[[k]]) for k in range(3)}
    bif = BIF(draws=16, localization=2.0, batch_size=ROWS, curvature_rows=1, per_token=True)
    found = bif_scores(Point(torch.zeros(6)), rows - rows.mean(0), queries, bif, straight, progress=False)
    truth = torch.einsum("rtp,qp->rtq", rows - rows.mean(0), query) / TERMS / 2.0
    terms = cube(found)
    assert terms.shape == (ROWS, TERMS, 3)
    assert np.allclose(terms.sum(1), found.scores, atol=1e-5)
    assert np.allclose(terms, truth.numpy(), atol=1e-5)


class Characters(L.LightningModule):
    """A tiny model of sequences; ``pad`` targets of every row are ignored, as by decoders that shift their labels."""

    def __init__(self, pad: int = 0) -> None:
        super().__init__()
        self.embed, self.out, self.pad = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY), pad

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, targets = batch
        if self.pad:
            targets = F.pad(targets[:, : TERMS - self.pad], (0, self.pad), value=-100)
        return F.cross_entropy(self.out(self.embed(ids)).reshape(-1, VOCABULARY), targets.reshape(-1))


def characters() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    text = torch.randint(VOCABULARY, (ROWS, TERMS + 1), generator=g)
    return text[:, :-1], text[:, 1:]


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_terms_are_derived_from_the_modules_own_step(pad: int) -> None:
    torch.manual_seed(0)
    model, (ids, targets) = Characters(pad), characters()
    with isolated(model):
        losses = row_losses(model, (ids, targets))
        terms = losses.terms(model, losses.rows(model, (ids, targets)))
    explicit = F.cross_entropy(model.out(model.embed(ids)).mT, targets, reduction="none")
    explicit[:, TERMS - pad :] = 0.0
    assert torch.allclose(terms, explicit / (TERMS - pad), atol=1e-6)
    query = {"q": (ids[:3], targets[:3])}
    found = bif_scores(model, (ids, targets), query, BIF(draws=24, per_token=True), progress=False)
    split = cube(found)
    assert split.shape == (ROWS, TERMS, 1)
    assert np.allclose(split.sum(1), found.scores, atol=1e-5)
    assert (split[:, TERMS - pad :] == 0).all()
    whole = bif_scores(model, (ids, targets), query, BIF(draws=24), progress=False)
    assert np.allclose(whole.scores, found.scores, atol=1e-5) and whole.tokens is None
    assert np.allclose(whole.loss, found.loss, rtol=1e-5)


def test_rows_of_one_term_cannot_be_split() -> None:
    squared = lambda module, batch: (module(batch)[:, 0]).square()  # noqa: E731
    with pytest.raises(InfluenceError, match="per_token=True has nothing to split"):
        bif_scores(nn.Linear(2, 1), torch.randn(8, 2), {"q": torch.randn(2, 2)}, BIF(per_token=True), squared)


def test_terms_are_saved(tmp_path: Path) -> None:
    model, batch = Characters(), characters()
    found = bif_scores(model, batch, {"a": batch, "b": EachRow(batch)}, BIF(draws=8, per_token=True), progress=False)
    again = InfluenceReport.load(example_report().with_attributions(found).save(tmp_path)).bif
    assert again.tokens is not None and found.tokens is not None
    for name, value in vars(found.tokens).items():
        assert np.array_equal(value, getattr(again.tokens, name)), name
    example_report().with_attributions(replace(found, tokens=None)).save(tmp_path)
    assert not (tmp_path / "attribution_tokens.parquet").exists() and InfluenceReport.load(tmp_path).bif.tokens is None


def example(**other: Any) -> BIFScores:
    """Five rows on one query, with other arrays in part."""
    same = example_bif_scores()
    names = inspect.signature(attribution).parameters
    arrays = {name: getattr(same, name) for name in names if name not in ("rows", "queries")}
    return attribution(same.rows, same.queries, **arrays | other)


def test_pairs_that_drift_or_rest_on_few_draws_are_marked() -> None:
    assert not example().doubtful.any()
    few = example(effective_draws=np.array([[400.0], [20.0], [400.0], [400.0], [400.0]]))
    drifting = example(trend=np.array([[0.0], [0.0], [0.0], [0.3], [0.8]]))  # ± is .1, the fourth covariance 0
    assert few.doubtful[:, 0].tolist() == [False, True, False, False, False]
    assert drifting.doubtful[:, 0].tolist() == [False, False, False, True, True]
    (_, _, helpful), _ = ends(few, 0, 5)
    assert [line[1].endswith(" ?") for line in helpful] == [int(line[0]) == 1 for line in helpful]


def test_slow_chains_mark_their_pairs() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(30, 4)
    squared = lambda module, batch: (module(batch)[:, 0] - 3.0).square()  # noqa: E731

    def run(step_size: float) -> BIFScores:
        bif = BIF(4, 100, 1, 0, step_size, 50.0, 1.0, 30, "rmsprop", reduced=False)
        return bif_scores(model, x, {"q": x[:5]}, bif, squared, progress=False)

    assert run(1e-5).doubtful.mean() > 0.9 and not run(1e-5).reliable
    assert run(2e-2).doubtful.mean() < 0.5


def test_ranking_by_correlation() -> None:
    loud = example(row_sd=np.array([1.0, 0.01, 1.0, 1.0, 1.0]))
    assert loud.top(1).tolist() == [4] and "covariance of the row's loss" in legend(loud)
    normalized = example(row_sd=loud.row_sd, settings={"normalized": True})
    assert normalized.top(1).tolist() == [1] and "correlation of the row's loss" in legend(normalized)
    (_, _, helpful), _ = ends(normalized, 0, 1)
    assert helpful[0][:3] == ("1", "+50", "1e+01")


def test_calibration_is_the_chains_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(60, 4)
    squared = lambda module, batch: (module(batch)[:, 0] - 1.0).square()  # noqa: E731
    before = [p.clone() for p in model.parameters()]
    found = calibrate(model, x, BIF(draws=8, localization=5.0), squared)
    scores = bif_scores(model, x, {"q": x[:5]}, BIF(draws=8, localization=5.0), squared, progress=False)
    assert found.step_size == scores.settings["step_size"] and found.localization == 5.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    again = bif_scores(model, x, {"q": x[:5]}, found.bif, squared, progress=False)
    assert again.settings["step_size"] == found.step_size and "step_size=" in str(found)
    # the Hessian of the mean squared error is known, and so is the spread of its posterior
    design = torch.cat([x, torch.ones(60, 1)], 1)
    hessian = 2 * design.T @ design / 60
    steepest = float(torch.linalg.eigvalsh(hessian)[-1])
    # the data are as strong as the localization, where the rows' gradients are largest: about the steepest direction
    assert found.bif.n_beta is not None and 0.95 < found.bif.n_beta * steepest / 5.0 < 1.4
    a = found.bif.n_beta * hessian + 5.0 * torch.eye(5)
    assert found.distance == pytest.approx(float(torch.linalg.inv(a).trace()) ** 0.5, rel=0.05)
    plain = calibrate(model, x, BIF(draws=8, localization=5.0, preconditioner="none", reduced=False), squared)
    assert plain.step_size < 4 / float(torch.linalg.eigvalsh(a)[-1]) < 40 * plain.step_size
    assert 0 < plain.inflation < 1 and found.inflation == 0
