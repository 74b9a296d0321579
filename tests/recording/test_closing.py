"""The closing pass: its shifts against dense algebra, where its rows come from, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from ine_callback import FINE, Recorder
from ine_callback.methods import FitContext, PerSamplePass
from ine_callback.methods.closing import Closing
from ine_callback.methods.fine.closing import unit_of
from ine_callback.queries.sources import DataSource
from ine_callback.recording import closing, recent_batches, snapshots
from ine_callback.report import InfluenceReport

ROWS, QUERIES, BATCH, EPOCHS = 96, 3, 16, 4
G = torch.Generator().manual_seed(0)
X = torch.randn(ROWS + QUERIES, 5, generator=G, dtype=torch.float64)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()
Batch = tuple[Tensor, Tensor]


class Kept(FINE):
    """f-INE that keeps what the closing pass found."""

    found: Closing | None = None

    def close(self, closing: Closing) -> None:
        super().close(closing)
        self.found = closing


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def squared(module: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(module(batch[0])[:, 0], batch[0][:, 0] ** 2)


def odd(module: nn.Module, batch: Batch) -> Tensor:
    """No standard form, so no labels can be drawn."""
    return module(batch[0]).abs().mean()


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def train(
    method: FINE,
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    data: bool = True,
    epochs: int = EPOCHS,
    every: list[tuple[nn.Module, float]] | None = None,
    **options: Any,
) -> tuple[nn.Module, Recorder]:
    """Trains with a recorder; rows are shuffled, and an epoch ends with a batch of another size.

    ``every`` gets a copy of the model after each step, with the rows' losses summed up to there.
    """
    model, g = network(), torch.Generator().manual_seed(1)
    descent = optimizer(model.parameters(), **options or {"lr": 0.3})
    queries = {"q": (X[ROWS:], Y[ROWS:]), "first": (X[ROWS:][:1], Y[ROWS:][:1]), "self": "self"}
    recorder = Recorder(
        model, descent, ROWS, queries, loss, [method], total_steps=epochs * -(-ROWS // BATCH), on_error="raise"
    )
    with recorder:
        for _ in range(epochs):
            for rows in torch.randperm(ROWS, generator=g).split(BATCH - 1):
                batch = (X[rows], Y[rows])
                with recorder.batch(rows, batch if data else None):
                    value = loss(model, batch)
                    recorder.see(value)
                    value.backward()
                descent.step()
                descent.zero_grad()
                if every is not None:
                    summed = (every[-1][1] if every else 0.0) + len(rows) * value.item()
                    every.append((network(), summed))
                    every[-1][0].load_state_dict(model.state_dict())
    return model, recorder


def explicit(model: nn.Module, rows: Tensor, labels: Tensor) -> Tensor:
    """Each row's gradient [n, P], by a pass each."""
    found = []
    for x, y in zip(X[rows], labels, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


def drawn(model: nn.Module, batches: list[tuple[Tensor, Any]]) -> Tensor:
    """The gradients [N, P] of drawn labels that the closing pass gets, in the order of the parameters."""
    context = FitContext(model, [], DataSource("Test", cross_entropy), cross_entropy, owner="Test", recent=batches)
    out = []
    for _, gradients in context.per_sample(PerSamplePass("sampled")):
        blocks = [gradients.formed(block)[:, 0] for block in sorted(gradients, key=lambda block: block.key)]
        # a block holds a weight and its bias side by side
        parts = [part for block in blocks for part in (block[:, :, :-1].flatten(1), block[:, :, -1].flatten(1))]
        out.append(torch.cat(parts, 1))
    return torch.cat(out)


@dataclass
class Dense:
    """What dense algebra says at one model's weights."""

    shift: Tensor
    sd: Tensor
    order: Tensor


def dense(model: nn.Module, batches: list[tuple[Tensor, Any]], rate: float) -> Dense:
    sampled = drawn(model, batches)
    v = torch.stack([explicit(model, torch.arange(ROWS, ROWS + n), Y[ROWS : ROWS + n]).mean(0) for n in (QUERIES, 1)])
    own = explicit(model, torch.arange(ROWS), Y[:ROWS])
    u = torch.linalg.solve(torch.eye(v.shape[1]).double() + rate / ROWS * sampled.T @ sampled, v.T).T
    sigma = torch.cat([p.detach().std(correction=0).expand(p.numel()) for p in network().parameters()])
    return Dense(rate / ROWS * own @ u.T, (sigma * u).norm(dim=1), (rate * v * (v - u)).sum(1))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_is_found_is_dense_algebra_at_three_weights(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "SPACING", 0.0)
    method, every = Kept(), list[tuple[nn.Module, float]]()
    _, recorder = train(method, every=every, lr=0.3, momentum=momentum)
    rate = 0.3 * EPOCHS * -(-ROWS // (BATCH - 1)) / (1 - momentum)
    steps = [*range(1, 11), 12, 14, 16, 19, 22, 26, 28]  # each 1.2 times the one before, and the last
    taken = np.diff(steps, prepend=0)
    gained = np.diff([every[t - 1][1] for t in steps], prepend=0.0) / taken / (every[-1][1] / 28)
    time = np.cumsum(taken * np.log1p(gained))
    nearest = [int(abs(time / time[-1] - share).argmin()) for share in (0.5, 0.7, 0.9)]
    models = [every[steps[k] - 1][0] for k in nearest]
    expected = [dense(each, recorder.closing.recent.batches(), rate) for each in models]
    assert method.found is not None
    shifts = torch.stack([one.shift for one in expected])
    np.testing.assert_allclose(method.found.shift, shifts.mean(0).numpy(), rtol=2e-4, atol=1e-6)
    ranking = (shifts / shifts.std(1, keepdim=True, correction=0)).mean(0)
    np.testing.assert_allclose(method.found.ranking, ranking.numpy(), rtol=2e-4, atol=1e-4)
    for name in ("sd", "order"):
        each = torch.stack([getattr(one, name) for one in expected])
        mean = each.square().mean(0).sqrt() if name == "sd" else each.mean(0)
        np.testing.assert_allclose(getattr(method.found, name), mean.numpy(), rtol=2e-4)
    pairs = [spearmanr(a[:, q], b[:, q])[0] for a, b in combinations(shifts.numpy(), 2) for q in range(2)]
    assert method.found.agreement == pytest.approx(np.mean(pairs), abs=1e-3)


def test_rows_count_as_much_as_they_weigh_in_the_training_loss() -> None:
    weight = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)

    def weighted(module: nn.Module, batch: Batch) -> Tensor:
        return 0.5 * F.cross_entropy(module(batch[0]), batch[1], weight)

    method, model, rate = Kept(), network(), 1e-6  # so small that there is no curvature
    descent = torch.optim.SGD(model.parameters(), lr=rate)
    recorder = Recorder(model, descent, ROWS, {"q": (X[ROWS:], Y[ROWS:])}, weighted, [method], on_error="raise")
    with recorder, recorder.batch(torch.arange(ROWS), (X[:ROWS], Y[:ROWS])):
        loss = weighted(model, (X[:ROWS], Y[:ROWS]))
        recorder.see(loss)
        loss.backward()
        descent.step()
    own, share = explicit(model, torch.arange(ROWS), Y[:ROWS]), weight[Y[:ROWS]] / weight[Y[:ROWS]].sum()
    v = explicit(model, torch.arange(ROWS, ROWS + QUERIES), Y[ROWS:])
    v = 0.5 * (weight[Y[ROWS:], None] * v).sum(0) / weight[Y[ROWS:]].sum()
    assert method.found is not None
    np.testing.assert_allclose(method.found.shift[:, 0], rate * 0.5 * share * (own @ v), rtol=1e-3)


def test_stale_weights_are_put_back() -> None:
    """Passes at three weights leave the last ones, and batch statistics, as they were."""
    one, other = nn.ModuleList(), nn.ModuleList()
    for into, wanted in ((one, True), (other, False)):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
        into.append(model)
        descent = torch.optim.SGD(model.parameters(), lr=0.1)
        method = Kept(closing=wanted)
        recorder = Recorder(model, descent, ROWS, {"q": (X[ROWS:], Y[ROWS:])}, cross_entropy, [method], 12)
        with recorder:
            for rows in torch.arange(ROWS).repeat(2).split(BATCH):
                with recorder.batch(rows, (X[rows], Y[rows])):
                    cross_entropy(model, (X[rows], Y[rows])).backward()
                descent.step()
                descent.zero_grad()
        assert (method.found is not None) is wanted
        assert not wanted or np.isfinite(method.found.agreement)  # type: ignore[union-attr]
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_earlier_weights_are_left_where_they_cost_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "FEW", 10)
    few = Kept()
    _, recorder = train(few, epochs=4)  # 2 x 96 rows beside 4 x 96: more than a quarter
    assert few.found is not None and np.isnan(few.found.agreement)
    (note,) = notes_of(recorder)
    assert note.startswith("closing pass at the last weights alone: earlier ones would take 192 more rows")
    assert recorder.closing.snapshots._next == 1  # none was copied
    many = Kept()
    train(many, epochs=12)
    assert many.found is not None and np.isfinite(many.found.agreement)
    monkeypatch.setattr(snapshots, "MAX_BYTES", 10)
    _, recorder = train(Kept(), epochs=12)
    assert "earlier ones take 0 MB each" in notes_of(recorder)[0]


def test_a_small_first_batch_leaves_no_untrue_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether earlier weights are worth their cost is judged anew when later batches are larger."""
    monkeypatch.setattr(snapshots, "FEW", 10)
    model, method = network(), Kept()
    descent = torch.optim.SGD(model.parameters(), lr=0.3)
    batches = [torch.arange(2), *torch.arange(ROWS).repeat(12).split(BATCH)]
    recorder = Recorder(model, descent, ROWS, {"q": (X[ROWS:], Y[ROWS:])}, cross_entropy, [method], len(batches))
    with recorder:
        for rows in batches:
            with recorder.batch(rows, (X[rows], Y[rows])):
                loss = cross_entropy(model, (X[rows], Y[rows]))
                recorder.see(loss)
                loss.backward()
            descent.step()
            descent.zero_grad()
    assert method.found is not None and np.isfinite(method.found.agreement)
    assert not any("closing pass" in note for note in recorder.notes)


def test_weights_that_are_not_finite_are_said() -> None:
    model = network()
    descent = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, descent, ROWS, {"q": (X[ROWS:], Y[ROWS:])}, cross_entropy)
    with recorder:
        for rows in torch.arange(ROWS).split(BATCH):
            with recorder.batch(rows, (X[rows], Y[rows])):
                cross_entropy(model, (X[rows], Y[rows])).backward()
            descent.step()
            descent.zero_grad()
        with torch.no_grad():
            model[0].bias[0] = torch.nan
    assert notes_of(recorder) == [
        "no closing pass: the trained weights are not finite; scores are of the run alone, which are less accurate"
    ]


def test_mu_ranks_by_the_pass_and_the_run_in_the_size_of_the_pass() -> None:
    method = Kept()
    _, recorder = train(method)
    _, alone = train(FINE(closing=False))
    mu, run = recorder.report().scores.mu[:, :2], alone.report().scores.mu[:, :2]
    assert method.found is not None and np.isfinite(recorder.report().scores.se).all()
    both = method.found.ranking / method.found.ranking.std(0) + run / run.std(0)
    ratio = mu / both
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-5)  # one size a query
    assert (ratio > 0).all()


def test_mu_times_its_unit_is_a_shift_in_the_size_of_the_pass() -> None:
    method = Kept()
    scores = train(method)[1].report().scores
    assert method.found is not None and scores.unit is not None and np.isnan(scores.unit[2])
    shifts = scores.mu[:, :2] * scores.unit[:2]  # all rows were observed equally often
    np.testing.assert_allclose((method.found.shift * shifts).sum(0), np.square(shifts).sum(0), rtol=1e-5)
    np.testing.assert_allclose(scores.unit[:2], unit_of(method.found, EPOCHS * ROWS), rtol=1e-9)


def test_the_losses_are_the_queries_at_the_end() -> None:
    method = Kept()
    model, recorder = train(method)
    assert method.found is not None
    expected = [cross_entropy(model, (X[ROWS:][:n], Y[ROWS:][:n])).item() for n in (QUERIES, 1)]
    np.testing.assert_allclose(method.found.losses, expected, rtol=1e-12)
    np.testing.assert_array_equal(recorder.report().scores.query_loss, [*method.found.losses, np.nan])


def test_without_it_scores_are_the_runs_and_tests_are_the_same() -> None:
    with_it, without = (train(FINE(closing=closing))[1].report().scores for closing in (True, False))
    assert not np.allclose(with_it.mu[:, :2], without.mu[:, :2])
    assert np.array_equal(with_it.mu[:, 2], without.mu[:, 2])  # self-influence is the run's
    assert np.array_equal(with_it.p, without.p) and np.array_equal(with_it.t, without.t)


def test_training_is_bit_identical_and_the_model_is_as_it_was() -> None:
    one, _ = train(FINE())
    other, _ = train(FINE(closing=False))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.training and not any(module._forward_hooks or module._backward_hooks for module in one.modules())


def test_more_rows_than_are_taken_exactly_get_kronecker_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, factored = Kept(), Kept()
    train(exact)
    monkeypatch.setattr(closing, "EXACT", 10)
    train(factored)
    assert exact.found is not None and factored.found is not None
    for k in range(2):
        a, b = exact.found.shift[:, k], factored.found.shift[:, k]
        assert np.corrcoef(a, b)[0, 1] > 0.9 and 0.5 < np.linalg.norm(a) / np.linalg.norm(b) < 2


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_schedule_that_ends_at_zero_changes_no_rate(optimizer: Any) -> None:
    """The last learning rate says nothing about the run."""
    method = Kept()
    model, g = network(), torch.Generator().manual_seed(1)
    descent = optimizer(model.parameters(), lr=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(descent, 12)
    recorder = Recorder(
        model, descent, ROWS, {"q": (X[ROWS:], Y[ROWS:])}, cross_entropy, [method], 12, [(cosine, 1)], on_error="raise"
    )
    with recorder:
        for rows in torch.randperm(ROWS, generator=g).repeat(2).split(BATCH):
            with recorder.batch(rows, (X[rows], Y[rows])):
                cross_entropy(model, (X[rows], Y[rows])).backward()
            descent.step()
            descent.zero_grad()
            cosine.step()
    assert descent.param_groups[0]["lr"] == 0 and method.found is not None
    assert np.isfinite(method.found.shift).all() and np.abs(method.found.shift).max() > 1e-5


def notes_of(recorder: Recorder) -> list[str]:
    report: InfluenceReport = recorder.report()
    return [note for note in report.run.notes if "closing pass" in note]


def test_what_stands_in_its_way_is_noted_and_scores_are_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = train(FINE(closing=False))
    _, without_data = train(FINE(), data=False)
    assert notes_of(without_data) == [
        "no closing pass: the batches were not given to Recorder.batch(rows, data); scores are of the run alone, which "
        "are less accurate"
    ]
    assert np.array_equal(without_data.report().scores.mu, plain.report().scores.mu)
    monkeypatch.setattr(recent_batches, "MAX_BYTES", 2**10)
    _, large = train(FINE())
    assert "the rows' batches take more than 0 MB" in notes_of(large)[0] and not large.closing.recent.batches()


def test_batches_loaded_into_the_same_tensors_are_not_taken_for_their_rows() -> None:
    """All held batches would be the last one."""
    model, x, y = network(), torch.empty(BATCH, 5).double(), torch.empty(BATCH, dtype=torch.long)
    descent = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, descent, ROWS, {"q": (X[ROWS:], Y[ROWS:])}, cross_entropy, on_error="raise")
    with recorder:
        for rows in torch.arange(ROWS).split(BATCH):
            with recorder.batch(rows, (x.copy_(X[rows]), y.copy_(Y[rows]))):
                cross_entropy(model, (x, y)).backward()
            descent.step()
            descent.zero_grad()
    (note,) = notes_of(recorder)
    assert "batches were changed in place after their step" in note
    assert np.isfinite(recorder.report().scores.mu).all()


def test_a_method_that_starts_again_forgets_its_last_closing_pass() -> None:
    method = FINE()
    train(method)
    _, again = train(method, data=False)
    _, alone = train(FINE(closing=False), data=False)
    assert np.array_equal(again.report().scores.mu, alone.report().scores.mu)


def test_a_loss_without_labels_to_draw_takes_the_rows_own() -> None:
    method = Kept()
    _, recorder = train(method, odd)
    assert method.found is not None and np.isfinite(method.found.shift).all()
    assert any("no labels can be drawn for this loss" in note for note in notes_of(recorder))


def test_squared_errors_draw_their_targets() -> None:
    method = Kept()
    _, recorder = train(method, squared, lr=0.01)
    assert method.found is not None and np.isfinite(method.found.shift).all() and not notes_of(recorder)


def test_an_interrupted_loop_gets_none() -> None:
    method = Kept()
    model = network()
    descent = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, descent, ROWS, {"q": (X[ROWS:], Y[ROWS:])}, cross_entropy, [method])
    recorder.start()
    for rows in torch.arange(ROWS).split(BATCH):
        with recorder.batch(rows, (X[rows], Y[rows])):
            cross_entropy(model, (X[rows], Y[rows])).backward()
        descent.step()
        descent.zero_grad()
    recorder.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert method.found is None and np.isfinite(recorder.report().scores.mu).all()
