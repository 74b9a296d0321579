"""What sketches add to self-influence's error is measured, told, and where it rules no row is ranked."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.methods.fine import sketch_noise
from ine_callback.methods.fine.fine import FINE
from ine_callback.methods.fine.sketch_noise import REFUSED, TOLD
from ine_callback.scores import QueryInfo, Scores
from ine_callback.scoring import directions
from tests.curvature.test_low_rank import LEFT, RIGHT, rows_of, sketch

ROWS, BATCH, EPOCHS = 96, 8, 2


@pytest.mark.parametrize("positions", [1, 7])
def test_squared_differences_of_halves_have_the_estimates_variance_as_their_mean(positions: int) -> None:
    """Of both norms, over 600 draws of the mixtures: both within some per cent (here the mean ratio within 15 %)."""
    grad_sample = rows_of(LEFT, RIGHT, 6, positions)
    draws = []
    for seed in range(600):
        drawn = sketch(0.3, seed)
        draws.append(grad_sample.rotated(drawn.left, drawn.right).norms(drawn.weights_and_halves))
    found = torch.stack(draws)
    norms, halves = found[..., :2], found[..., 2:].unflatten(-1, (2, 2))
    ratio = halves.square().mean(0).sum(1) / norms.var(0)
    assert ratio.mean(0).tolist() == pytest.approx([1.0, 1.0], abs=0.15)
    assert (halves.mean(0).abs() < 5 * halves.std(0) / 600**0.5 + 1e-12).all()


def scores_of(rank: int | None) -> tuple[Scores, list[str]]:
    """Sequences whose gradients are much alike, so that sketches matter."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(ROWS, 12, 56, generator=g), torch.randint(3, (ROWS, 12), generator=g)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(56, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())

    options = {"rank": rank, "curvature_every": 1, "on_error": "raise", "total_steps": EPOCHS * ROWS // BATCH}
    with Recorder(model, optimizer, ROWS, {"self": "self"}, loss, **options) as recorder:
        for rows in torch.randperm(ROWS, generator=g).repeat(EPOCHS).split(BATCH):
            with recorder.batch(rows, (x[rows], y[rows])):
                value = loss(model, (x[rows], y[rows]))
                recorder.see(value)
                value.backward()
            optimizer.step()
            optimizer.zero_grad()
    report = recorder.report()
    return report.scores, report.run.notes


def test_the_error_is_that_by_which_scores_with_other_draws_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch_noise, "TOLD", 0.001)  # a small network's sketches leave little
    exact, notes = scores_of(None)
    assert not any("sketches" in note for note in notes)
    one, notes = scores_of(32)
    (note,) = (note for note in notes if "sketches" in note)
    monkeypatch.setattr(directions, "zlib", SimpleNamespace(crc32=lambda text: zlib.crc32(text + b"another draw")))
    other, _ = scores_of(32)
    mu, again, truth = (scores.mu[:, 0] for scores in (one, other, exact))
    noise = (mu - again).var() / 2
    told = float(note.split("self-influence: ")[1].split("%")[0]) / 100
    assert told == pytest.approx(noise / mu.var(), rel=0.5)  # 96 rows, two draws
    assert float(note.rsplit(" ", 1)[1]) == pytest.approx(np.corrcoef(mu, truth)[0, 1], abs=0.03)
    assert (one.se[:, 0] ** 2).mean() > (exact.se[:, 0] ** 2).mean() + noise / 2


def test_where_noise_rules_no_row_is_ranked_and_the_tests_stand() -> None:
    fine, plain = FINE(), FINE()
    g = torch.Generator().manual_seed(0)
    for each in (fine, plain):
        each.start(12, (QueryInfo("self", "self", "?"),), torch.device("cpu"), True)
    for _ in range(4):
        for rows in torch.randperm(12, generator=g).split(4):
            signals = 1 + 0.1 * torch.rand(4, 1, generator=g)
            plain.update(rows, signals, 0.1)
            fine.update(rows, signals, 0.1, halves=torch.randn(4, 1, 2, generator=g))
    ruled, known = fine.compute(), plain.compute()
    assert np.isnan(ruled.mu).all() and np.isnan(ruled.se).all() and np.isfinite(known.mu).all()
    np.testing.assert_array_equal(ruled.p, known.p)
    refused = [note for note in fine.notes() if "not ranked" in note]
    assert refused and "rank=None" in refused[0] and not any("sketches" in note for note in plain.notes())
    assert REFUSED > TOLD


def test_a_checkpoint_without_halves_goes_on() -> None:
    fine, other = FINE(), FINE()
    for each in (fine, other):
        each.start(4, (QueryInfo("self", "self", "?"),), torch.device("cpu"), True)
    fine.update(torch.arange(4), torch.rand(4, 1), 0.1, halves=torch.rand(4, 1, 2))
    state = fine.state_dict()
    del state["halves"]
    other.load_state_dict(state)
    other.update(torch.arange(4), torch.rand(4, 1), 0.1, halves=torch.rand(4, 1, 2))
    assert other.compute().mu.shape == (4, 1)
