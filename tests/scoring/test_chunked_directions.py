"""Directions of many queries are made by chunks of them: the same signals, and never the gradients of all at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ine_callback.capture import Block, Outer
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.low_rank import Side, low_rank
from ine_callback.curvature.spectral import exponential
from ine_callback.queries import SelfQuery, evaluation
from ine_callback.recording import closing
from ine_callback.report import InfluenceReport
from ine_callback.scoring import refresh
from ine_callback.scoring.directions import ChunkedDirection, CompressedDirection, DirectionSpec, direction_of
from ine_callback.scoring.sign_contrasts import Contrasts
from tests.helpers.stored import Training, data

QUERIES = 7


def recorded(**options: Any) -> tuple[InfluenceReport, Training]:
    x, y = data()
    queries: dict[str, Any] = {f"row {k}": (x[k : k + 1], y[k : k + 1]) for k in range(QUERIES)}
    one = Training(None, queries=queries | {"self": SelfQuery()}, **options)
    with one.recorder:
        one.steps()
    return one.recorder.report(), one


@pytest.mark.parametrize("rank", [None, 32])
def test_chunks_of_queries_give_the_scores_of_all_at_once(monkeypatch: pytest.MonkeyPatch, rank: int | None) -> None:
    whole, one = recorded(rank=rank)
    sizes, gradients = [], evaluation.gradients
    elements = sum(p.numel() for p in one.model.parameters())

    def watched(queries: Any, *rest: Any) -> Any:
        sizes.append(len(queries))
        return gradients(queries, *rest)

    monkeypatch.setattr(refresh, "gradients", watched)
    monkeypatch.setattr(refresh, "WHOLE_BYTES", (QUERIES - 1) * 4 * elements)
    monkeypatch.setattr(refresh, "CHUNK_BYTES", 3 * 4 * elements)
    chunked, other = recorded(rank=rank)
    assert set(sizes) == {3, 1} and other.recorder.signals.chunked and not one.recorder.signals.chunked
    np.testing.assert_allclose(chunked.scores.mu, whole.scores.mu, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(chunked.scores.se, whole.scores.se, rtol=1e-3, atol=1e-5)


def test_a_forced_basis_is_taken_where_it_retains_too_little() -> None:
    g = torch.Generator().manual_seed(0)
    u = torch.randn(3, 1, 64, 64, generator=g)
    side = Side(torch.ones(1, 64), None)
    assert low_rank(u, side, side, 4) is None
    found = low_rank(u, side, side, 4, forced=True)
    assert found is not None
    basis, inside, retained = found
    assert basis.shape == (1, 64, 12) and inside.shape == (3, 1, 64, 12)
    projected = (inside @ basis.transpose(-1, -2)).square().sum() / u.square().sum()
    torch.testing.assert_close(projected, retained, rtol=1e-4, atol=0)
    assert 12 / 64 < float(retained) < 0.9


def test_a_closing_pass_that_would_hold_too_much_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "QUERY_BYTES", 1000)
    report, _ = recorded()
    assert any("no closing pass: it needs the gradients of 7 queries at once" in note for note in report.run.notes)
    assert np.isfinite(report.scores.mu).all()


@pytest.mark.parametrize("positions", [1, 3])
def test_low_rank_chunks_contract_to_the_inner_products(positions: int) -> None:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    block = Block("w", (torch.nn.Parameter(draw(48, 64)),), (1, 48, 64), matrix=True)
    grad_sample, kfac = Outer(draw(5, 1, positions, 64), draw(5, 1, positions, 48)), KFAC()
    kfac.observe(block, grad_sample, terms=5.0)
    kfac.end_step()
    spec = DirectionSpec(kfac.operator(block, exponential(0.1)), 1.0, (0.1, 0.0))
    u = draw(QUERIES, 1, 48, 1) @ draw(QUERIES, 1, 1, 64)
    contrasts = Contrasts(3)
    parts = [direction_of(block, contrasts, part, spec, 32, None, forced=True)[0] for part in u.split(3)]
    assert all(isinstance(part, CompressedDirection) for part in parts)
    joined = ChunkedDirection.of(parts)
    joined.draw(1)
    found, _ = joined.contract(grad_sample)
    assert found is not None
    gradients = grad_sample.output_grads.transpose(-1, -2) @ grad_sample.activations
    products = torch.einsum("bgoi,qgoi->bqgo", gradients, u).flatten(2)
    torch.testing.assert_close(found[..., 0], products.sum(2), rtol=1e-6, atol=1e-6)
    whole, _ = direction_of(block, contrasts, u, spec, None, None)
    expected, _ = whole.contract(grad_sample)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the contrasts, too
