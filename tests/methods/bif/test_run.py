"""BIF against covariances known in closed form, its noise reduction, its checks, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.bif import BIF
from ine_callback.methods.bif.checks import noise_fraction
from ine_callback.methods.bif.evaluation import EachRow
from ine_callback.methods.bif.run import bif_scores
from ine_callback.methods.bif.scores import BIFScores
from ine_callback.queries import CallableQuery, MarginQuery
from tests.helpers.bif.quadratic import PLAIN, WHOLE, Point, exact, forms, quadratic_problem
from tests.helpers.cases import mostly_long

ADAPTIVE = [{}, {"preconditioner": "none"}]


def squared_distance(module: Any, batch: Tensor) -> Tensor:
    """Row loss ‖w − a‖²/2 for rows a [b, P]."""
    return 0.5 * (module.w - batch).square().sum(1)


@pytest.mark.parametrize("settings", [*ADAPTIVE, PLAIN | {"step_size": 0.02, "thinning": 20}])
def test_example_of_one_parameter(settings: dict[str, Any]) -> None:
    """L = w²/2, n_beta = γ = 2: the posterior is N(0, 1/4). Rows (w − a)²/2 with a = 0, −1, +1, query (w − 1)²/2."""
    rows = torch.tensor([[0.0], [-1.0], [1.0]])
    bif = BIF(chains=64, draws=100, n_beta=2.0, localization=2.0, batch_size=WHOLE, **settings)
    scores = bif_scores(Point(torch.zeros(1)), rows, {"query": torch.ones(1, 1)}, bif, squared_distance, progress=False)
    assert np.abs(scores.scores[:, 0] - [0.03125, -0.21875, 0.28125]).max() < (0.03 if "reduced" in settings else 0.01)
    assert np.abs((scores.scores[:, 0] - [0.03125, -0.21875, 0.28125]) / scores.se[:, 0]).max() < 4
    assert scores.top(1).tolist() == [2] and scores.bottom(1).tolist() == [1]


@pytest.mark.parametrize("settings", mostly_long([*ADAPTIVE, PLAIN], "{}"))
def test_quadratic_losses_at_finite_step_size(settings: dict[str, Any]) -> None:
    model, data, query = quadratic_problem()
    n_beta, gamma, h = 10.0, 4.0, data[1].mean(0)
    a = n_beta * h + gamma * torch.eye(5)
    step = 1.0 if not settings else 0.8 / float(torch.linalg.eigvalsh(a).max())
    v = torch.linalg.inv(a - step / 4 * a @ a) if settings == PLAIN else torch.linalg.inv(a)
    bif = BIF(64, 200, 6, 60, step, n_beta, gamma, WHOLE, **settings)
    scores = bif_scores(model, data, {"q": EachRow(query)}, bif, forms, progress=False)
    truth = exact(data, query, v)
    z = (scores.scores - truth) / scores.se
    assert np.corrcoef(scores.scores.ravel(), truth.ravel())[0, 1] > 0.999
    assert np.abs(z).max() < 4.5 and np.sqrt((z**2).mean()) < 1.5  # errors as large as the standard errors say
    if settings == PLAIN:  # the test can tell the finite-step law from the posterior's
        assert np.abs((scores.scores - exact(data, query, torch.linalg.inv(a))) / scores.se).max() > 6


def many_chains(thinning: int) -> tuple[BIFScores, NDArray[np.float64]]:
    """800 mirrored pairs of 12 draws, and the truth [R, Q]."""
    model, data, query = quadratic_problem()
    a = 10.0 * data[1].mean(0) + 4.0 * torch.eye(5)
    bif = BIF(1600, 12, thinning, 30, 0.7, 10.0, 4.0, WHOLE)
    scores = bif_scores(model, data, {"q": EachRow(query)}, bif, forms, progress=False)
    return scores, exact(data, query, torch.linalg.inv(a))


def test_reduced_is_unbiased_and_has_less_noise_than_plain() -> None:
    scores, truth = many_chains(thinning=8)
    z = (scores.scores - truth) / scores.se
    assert np.abs(z).max() < 4 and np.sqrt((z**2).mean()) < 1.5
    assert (scores.se**2 / scores.plain_se**2).mean() < 0.3


def test_dependent_draws_bias_reduced_less_than_plain() -> None:
    """A sample's covariance around its own mean is too small when draws are alike; so is the control
    variate's.
    """
    scores, truth = many_chains(thinning=1)
    slopes = [float((estimate * truth).sum() / (truth**2).sum()) for estimate in (scores.scores, scores.plain)]
    assert slopes[1] < 0.8 and abs(1 - slopes[0]) < 0.5 * abs(1 - slopes[1])


def network() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A small trained classifier, its 120 rows and 20 query rows."""
    torch.manual_seed(0)
    x = torch.randn(140, 6)
    y = (x[:, :3] + 0.3 * torch.randn(140, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:120]), y[:120]).backward()
        optimizer.step()
    return model, (x[:120], y[:120]), (x[120:], y[120:])


def entropies(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def test_on_a_network_both_estimators_mean_the_same() -> None:
    model, rows, query = network()
    bif = BIF(chains=128, draws=60, thinning=4, step_size=1.0, n_beta=100.0, batch_size=WHOLE)
    run = bif_scores(model, rows, {"q": EachRow(query)}, bif, entropies, progress=False)
    z = (run.scores - run.plain) / run.plain_se
    assert np.abs(z).max() < 4 and np.sqrt((z**2).mean()) < 1.3
    assert (run.scores * run.plain).sum() / (run.plain**2).sum() == pytest.approx(1, abs=0.03)
    assert np.median(run.se**2 / run.plain_se**2) < 0.6


@pytest.mark.long
def test_standard_errors_are_what_runs_scatter_by() -> None:
    model, rows, query = network()
    settings = {"draws": 40, "batch_size": 40}
    for more in ({}, PLAIN | {"thinning": 8}):
        bifs = [BIF(**settings, **more, seed=seed) for seed in range(6)]  # type: ignore[arg-type]
        runs = [bif_scores(model, rows, {"q": EachRow(query)}, bif, entropies, progress=False) for bif in bifs]
        between = np.stack([run.scores for run in runs]).std(0, ddof=1)
        within = np.sqrt(np.stack([run.se**2 for run in runs]).mean(0))
        assert 0.75 < np.median(between / within) < 1.35


def influence(h: Tensor, gradients: Tensor, query: Tensor, damping: float) -> NDArray[np.float64]:
    """gᵢᵀ (H + damping)⁻¹ v, the damped influence function."""
    return (gradients @ torch.linalg.solve(h + damping * torch.eye(len(h)), query)).double().numpy()


def test_ridge_regression_is_the_damped_influence_function() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(80, 6, generator=g, dtype=torch.float64)
    y = x @ torch.randn(6, generator=g).double() + 0.5 * torch.randn(80, generator=g).double()
    gamma = 0.05
    w = torch.linalg.solve(x.T @ x, x.T @ y)  # γ holds draws near w itself, so w is the posterior's centre

    def squared(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (batch[0] @ module.w - batch[1]).square()

    n_beta = 2000.0
    bif = BIF(16, 300, n_beta=n_beta, localization=n_beta * gamma, batch_size=WHOLE)
    query = (x[:20], y[:20] + 1)
    scores = bif_scores(Point(w), (x, y), {"q": query}, bif, squared, progress=False)
    gradients = (x @ w - y)[:, None] * x
    v = ((query[0] @ w - query[1])[:, None] * query[0]).mean(0)
    truth = influence(x.T @ x / 80, gradients, v, gamma) / n_beta
    assert stats.spearmanr(scores.scores[:, 0], truth)[0] > 0.95
    assert np.polyfit(truth, scores.scores[:, 0], 1)[0] == pytest.approx(1, abs=0.1)


def test_logistic_regression_near_its_optimum_is_the_damped_influence_function() -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(100, 5, generator=g, dtype=torch.float64)
    y = (x[:, 0] - x[:, 1] + torch.randn(100, generator=g).double() > 0).double()

    def loss(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(batch[0] @ module.w, batch[1], reduction="none")

    w = torch.zeros(5, dtype=torch.float64)
    for _ in range(30):  # Newton
        p = (x @ w).sigmoid()
        h = x.T @ (x * (p * (1 - p))[:, None]) / 100
        w -= torch.linalg.solve(h, x.T @ (p - y) / 100)
    n_beta, damping = 4000.0, 0.02
    bif = BIF(16, 300, n_beta=n_beta, localization=n_beta * damping, batch_size=50)
    scores = bif_scores(Point(w), (x, y), {"q": (x[:9], 1 - y[:9])}, bif, loss, progress=False)
    v = (((x @ w).sigmoid() - (1 - y))[:9, None] * x[:9]).mean(0)
    truth = influence(h, ((x @ w).sigmoid() - y)[:, None] * x, v, damping)
    assert stats.spearmanr(scores.scores[:, 0], truth)[0] > 0.95


@pytest.mark.parametrize("settings", [{}, PLAIN | {"thinning": 4}])
def test_p_values_are_uniform_where_rows_and_query_share_no_parameter(settings: dict[str, Any]) -> None:
    """400 rows, each on its own parameter, and a query on another: every true score is 0."""
    rows = torch.arange(1, 401)

    def squared(module: Any, batch: Tensor) -> Tensor:
        return 0.5 * module.w[batch].square() + module.w[batch]

    bif = BIF(8, 100, n_beta=1.0, localization=1.0, batch_size=WHOLE, **settings)
    scores = bif_scores(Point(torch.zeros(401)), rows, {"q": torch.tensor([0])}, bif, squared, progress=False)
    assert stats.kstest(scores.p[:, 0], "uniform").pvalue > 0.01
    assert (scores.q > 0.05).mean() > 0.99


# -- checks -----------------------------------------------------------------------------------------------------------


def healthy(**settings: Any) -> BIFScores:
    model, rows, query = network()
    return bif_scores(model, rows, {"q": EachRow(query)}, BIF(**settings), entropies, progress=False)


@pytest.mark.parametrize("settings", mostly_long([*ADAPTIVE, PLAIN | {"thinning": 8, "draws": 300}], "{}"))
def test_healthy_chains_pass_every_check(settings: dict[str, Any]) -> None:
    scores = healthy(**settings)
    assert scores.reliable and np.isfinite(scores.scores).all() and scores.settings["localization"] > 0, scores.reasons


def test_under_burnt_chains_are_caught() -> None:
    scores = healthy(preconditioner="rmsprop", reduced=False, step_size=2e-5, draws=100)
    assert not scores.reliable
    assert any("drift" in reason and "raise burn_in" in reason for reason in scores.reasons)
    assert any("left without trend" in reason for reason in scores.reasons)


def test_diverging_chains_are_caught() -> None:
    model, rows, query = network()

    def steep(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]).square().sum(1) - 1.0).square()

    bif = BIF(step_size=0.5, draws=100, **PLAIN)  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match=r"only . draws before the chains ended; the chains diverged at draw"):
        bif_scores(model, rows, {"q": EachRow(query)}, bif, steep, progress=False)
    coarse = BIF(step_size=0.03, n_beta=100.0, localization=15.0, draws=100, **PLAIN)  # type: ignore[arg-type]
    wide = bif_scores(model, rows, {"q": query}, coarse, entropies, progress=False)
    assert any("step-size bias" in reason and "lower step_size" in reason for reason in wide.reasons)


@pytest.mark.long
def test_a_localization_that_outweighs_the_data_is_caught() -> None:
    scores = healthy(localization=1e6, n_beta=100.0)
    assert not scores.reliable and any("data against localization" in reason for reason in scores.reasons)
    assert healthy(localization=1e6).reliable  # the data are given a weight to match


def test_draws_that_have_forgotten_what_was_learned_are_caught() -> None:
    far = healthy(localization=0.2, n_beta=1.0, draws=40)
    assert any("learning lost" in reason and "raise localization" in reason for reason in far.reasons)


def test_noise_is_that_of_rows_against_each_other() -> None:
    """What all rows have in common ranks none of them, however noisy it is."""
    scores = np.array([[5.0], [6.0], [7.0]])
    assert noise_fraction(scores, np.full((3, 1), 0.5)) == pytest.approx(0.25 / scores.var())
    model, rows, query = network()

    def together(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return entropies(module, batch) + 300 * sum(p.square().sum() for p in module.parameters()) ** 2

    bif = BIF(draws=40, localization=300.0, n_beta=10.0)
    found = bif_scores(model, rows, {"q": EachRow(query)}, bif, together, progress=False)
    (check,) = (s for s in found.checks if s.name == "noise fraction of the scores")
    assert check.value < 0.5 * np.median((found.se**2).mean(0) / found.scores.var(0))


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_step_size_bias_is_the_steepest_directions(fraction: float) -> None:
    """L = ½ Σ h w², h = 1 .. 5: at a step of 4 fraction / h the variance is 1 / (1 - fraction) times too large."""
    h = torch.arange(1.0, 6.0, dtype=torch.float64)
    rows = torch.cat([torch.diag(h.sqrt()), -torch.diag(h.sqrt())]) * 5**0.5

    def loss(module: Any, batch: Tensor) -> Tensor:
        return 0.5 * (h * module.w.square()).sum() + batch @ module.w

    step = 4 * fraction / (5.0 + 1.0)
    bif = BIF(8, 4, step_size=step, n_beta=1.0, localization=1.0, batch_size=WHOLE, **PLAIN)
    scores = bif_scores(Point(torch.zeros(5).double()), rows, {"q": rows[:1]}, bif, loss, progress=False)
    (check,) = (s for s in scores.checks if s.name == "step-size bias")
    assert check.value == pytest.approx(fraction / (1 - fraction), rel=0.02)


def test_noise_is_named() -> None:
    model, rows, query = network()
    few = bif_scores(model, rows, {"q": query}, BIF(2, 4, n_beta=10.0, **PLAIN), entropies, progress=False)  # type: ignore[arg-type]
    assert any("noise fraction" in reason and "raise draws" in reason for reason in few.reasons)


# -- no trace ---------------------------------------------------------------------------------------------------------


class Busy(nn.Module):
    """BatchNorm in training mode, dropout, a frozen layer, a counter, gradients waiting for their step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(inplace=True))
        self.frozen, self.calls = nn.Linear(8, 3).requires_grad_(False), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.frozen(self.net(x))
        return out


def state_of(model: Busy) -> list[Any]:
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    generators = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64)), random.getstate()]  # type: ignore[union-attr]
    flags = [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]
    return [*tensors, *grads, *generators, flags, model.calls, [id(p) for p in model.parameters()]]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("interrupted", [False, True])
def test_module_and_generators_are_as_before(interrupted: bool) -> None:
    model, _ = Busy(), torch.manual_seed(3)
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    F.cross_entropy(model(x), y).backward()
    asked = 0

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        random.random()
        np.random.rand()
        return F.cross_entropy(module(batch[0]) + torch.rand(()), batch[1], reduction="none")

    def query(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal asked
        asked += 1
        if interrupted and asked > 20:
            raise KeyboardInterrupt
        return loss(module, batch).mean()

    before = state_of(model)
    queries = {"q": CallableQuery(query, (x[:5], y[:5]))}
    scores = bif_scores(model, (x, y), queries, BIF(draws=60, batch_size=10), loss, progress=False)
    assert same(before, state_of(model))
    assert scores.loss.shape[1] == (19 if interrupted else 60) and np.isfinite(scores.scores).all()
    if interrupted:
        assert "interrupted after 19 of 60 draws" in scores.notes[0] and not scores.reliable


def test_the_seed_decides() -> None:
    one, two, other = (healthy(draws=10, seed=seed).scores for seed in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_too_few_draws_for_errors_give_scores_without() -> None:
    found = healthy(draws=6, chains=2)
    assert np.isfinite(found.scores).all() and found.se is not None and np.isnan(found.se).all() and not found.reliable


# -- ways to run ------------------------------------------------------------------------------------------------------


class Unbatched(nn.Module):
    """Looks at a value: vmap cannot run it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out + 0 if float(out.detach().sum()) > 1e9 else out


def test_one_by_one_gives_the_same_scores_and_says_so() -> None:
    model, rows, query = network()
    together, alone = (
        bif_scores(m, rows, {"q": EachRow(query)}, BIF(draws=12), entropies, progress=False)
        for m in (model, Unbatched(copy.deepcopy(model)))
    )
    assert np.allclose(together.scores, alone.scores, atol=1e-5)
    assert not together.notes and "one by one" in alone.notes[0]


def test_chosen_rows_and_every_kind_of_query() -> None:
    model, rows, query = network()
    queries = {
        "each": EachRow(query),
        "mean": query,
        "margin": MarginQuery(query),
        "self margin": MarginQuery(query, True),
    }
    all_of_them = bif_scores(model, rows, queries, BIF(draws=12), entropies, progress=False)
    some = bif_scores(model, rows, queries, BIF(draws=12, rows=[7, 3]), entropies, progress=False)
    assert some.rows.tolist() == [7, 3] and np.allclose(some.scores, all_of_them.scores[[7, 3]], atol=1e-5)
    names = [info.name for info in some.queries]
    assert names[0] == "each/0" and names[20:22] == ["mean", "margin"] and len(names) == 42
    each, mean = all_of_them.scores[:, :20], all_of_them.scores[:, 20]
    assert np.allclose(each.mean(1), mean, atol=1e-5)  # covariance is linear, and so is the control variate
    drawn = bif_scores(model, rows, {"mean": query}, BIF(draws=12, rows=5), entropies, progress=False)
    assert len(drawn.rows) == 5 and "scored are 5 of 120 rows" in drawn.notes[0]
    with pytest.raises(InfluenceError, match=r"rows=\[500\] must be dataset indices, 0 to 119"):
        bif_scores(model, rows, {"mean": query}, BIF(rows=[500]), entropies, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, "draws=0 must be an integer"),
        ({"draws": 3}, "too few"),
        ({"burn_in": -1}, "burn_in=-1"),
        ({"step_size": 0.0}, "step_size=0.0 must be positive"),
        ({"preconditioner": "adam"}, "preconditioner='adam' is none of"),
        ({"preconditioner": "rmsprop"}, "has no control-variate chain; pass reduced=False"),
        ({"chains": 5}, "must be even"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        BIF(**settings)
