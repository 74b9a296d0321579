"""Solvers against the dense solution of the damped Fisher, and samplers against the whole Fisher."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor

from ine_callback import IF
from ine_callback.capture.per_sample_gradients import Lookup, Outer
from ine_callback.errors import InfluenceError
from ine_callback.methods.influence.curvature import Curvature
from ine_callback.methods.influence.samplers import Curvature as ByCurvature
from ine_callback.methods.influence.samplers import Nearest, Sampler, Uniform, Weighted, distances_to_centres
from ine_callback.methods.influence.solvers.astra import astra
from ine_callback.methods.influence.solvers.base import System
from ine_callback.methods.influence.solvers.cg import conjugate_gradients
from ine_callback.methods.influence.solvers.lissa import lissa
from tests.helpers.contexts import ROWS, numbers
from tests.methods.influence.conftest import Dense, curvature, problem, relative

DAMPING = 5e-3


class AllRows:
    """No sampling: every minibatch is the whole set."""

    def draw(self, rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.arange(rows), torch.full((rows,), 1 / rows, dtype=torch.float64)


def prepared(solver: str = "astra", sampler: Sampler | None = None) -> tuple[Dense, System, Tensor, Tensor]:
    """A problem, its system, the right-hand sides and the dense solutions."""
    found = problem()
    made = curvature(found, IF(solver=solver, damping=DAMPING))  # type: ignore[arg-type]
    system = made.system()
    system.sampler = sampler or Uniform()
    v = found.queries
    return found, system, v, torch.linalg.solve(found.fisher + DAMPING * torch.eye(v.shape[1]).double(), v.T).T


def test_preconditioned_gradients_converge_in_forty_products() -> None:
    _, system, v, wanted = prepared("pcg")
    solution = conjugate_gradients(system, v, 40, 1e-12, system.precondition)
    assert relative(solution.x, wanted) < 1e-9 and solution.residual.max() < 1e-9
    plain = conjugate_gradients(system, v, 10, 1e-12)
    assert plain.residual.max() > conjugate_gradients(system, v, 10, 1e-12, system.precondition).residual.max()


def test_a_converged_query_stays_as_it_is() -> None:
    _, system, v, _ = prepared("pcg")
    both = conjugate_gradients(system, torch.stack([v[0], 1e-3 * v[0]]), 40, 1e-4, system.precondition)
    assert relative(both.x[1] * 1e3, both.x[0]) < 1e-12
    zero = conjugate_gradients(system, torch.zeros_like(v), 40, 1e-4, system.precondition)
    assert zero.iterations == 0 and float(zero.x.abs().max()) == 0.0


@pytest.mark.long
def test_astra_starts_at_ekfac_and_converges_on_all_rows() -> None:
    _, system, v, wanted = prepared("astra", AllRows())
    start = system.precondition(v)
    assert relative(astra(system, v, 1, 1e-12, 0.0, 1e-3).x, start) < 1e-9
    solution = astra(system, v, 3000, None, 0.0, 1e-3)
    assert relative(solution.x, wanted) < 1e-8 and solution.largest is not None and solution.largest >= 0.99


def test_astra_needs_fewer_steps_than_lissa() -> None:
    _, system, v, wanted = prepared("astra", AllRows())
    errors = [relative(one(system, v, 100, None, 0.0, 1e-3).x, wanted) for one in (astra, lissa)]
    assert errors[0] < errors[1] / 5


@pytest.mark.long
def test_lissa_reaches_the_damped_solution() -> None:
    _, system, v, wanted = prepared("lissa", AllRows())
    assert relative(lissa(system, v, 6000, None, 0.0, 1e-3).x, wanted) < 1e-6


@pytest.mark.parametrize("solver", ["astra", "lissa"])
def test_minibatches_come_near_the_solution(solver: str) -> None:
    found, system, v, wanted = prepared(solver)
    system.batch_size = 32
    solution = {"astra": astra, "lissa": lissa}[solver](system, v, 400, None, 0.0, 1e-3)
    assert relative(solution.x, wanted) < 0.3
    del found


def test_a_step_that_is_too_long_is_refused_with_the_eigenvalue(monkeypatch: pytest.MonkeyPatch) -> None:
    _, system, v, _ = prepared("astra", AllRows())
    monkeypatch.setattr(System, "largest_eigenvalue", lambda *_: 1e-6)
    with pytest.raises(InfluenceError, match=r"solver='astra' diverges: the largest eigenvalue seen is 1e-06.*damping"):
        astra(system, v, 400, 1e9, 0.0, 1e-3)


def test_datainf_is_the_mean_of_inverses() -> None:
    found = problem()
    scores = found.run(IF(solver="datainf", fisher="empirical", damping=DAMPING))
    start, wanted = 0, 0.0
    for size in (25, 18):  # block by block
        g, v = (x[:, start : start + size] for x in (found.rows, found.queries))
        eye = DAMPING * torch.eye(size).double()
        inverse = torch.stack([torch.linalg.inv(eye + torch.outer(one, one)) for one in g]).mean(0)
        wanted = wanted + g @ inverse @ v.T / len(g)
        start += size
    assert relative(scores.scores, wanted) < 1e-12


def fisher_by(sampler: Sampler, system: System, draws: int, size: int) -> Tensor:
    """Products of sampled Fishers with one vector [draws, P]."""
    x, generator = numbers(1, system.space.size), torch.Generator().manual_seed(0)
    return torch.cat(
        [system.fisher.product(system.space, x, *sampler.draw(ROWS, size, generator)) for _ in range(draws)]
    )


def test_uniform_and_curvature_draws_are_unbiased_and_the_nearest_rows_are_not() -> None:
    found, system, _, _ = prepared("lissa")
    traces = system.fisher.traces()
    assert relative(traces, found.parts.diagonal(dim1=1, dim2=2).sum(1)) < 1e-10
    wanted = found.fisher @ numbers(1, system.space.size)[0]
    spread = {}
    for name, sampler in (("uniform", Uniform()), ("curvature", ByCurvature(traces))):
        drawn = fisher_by(sampler, system, 400, 16)
        z = (drawn.mean(0) - wanted) / (drawn.std(0) / 20)
        assert float(z.square().mean()) < 4 and float(z.abs().max()) < 4.5, name  # its entries are correlated
        spread[name] = float(drawn.std(0).norm())
    assert spread["curvature"] < spread["uniform"]
    features = torch.stack([torch.as_tensor(part.trace()) for part in found.parts])[:, None]
    nearest = Nearest(distances_to_centres(features, 3, 0))
    assert float((fisher_by(nearest, system, 1, 9)[0] - wanted).norm() / wanted.norm()) > 0.1


def test_each_class_has_the_same_number_of_rows_by_its_probability() -> None:
    chances = torch.rand(200, 4, generator=torch.Generator().manual_seed(1)).double() ** 4
    sampler, generator = Weighted(chances), torch.Generator().manual_seed(2)
    drawn = torch.stack([sampler.draw(200, 4, generator)[0] for _ in range(20000)])  # one row of each class
    for k in range(4):
        counts = torch.bincount(drawn[:, k], minlength=200).double()
        wanted = 20000 * chances[:, k] / chances[:, k].sum()
        many = wanted > 5
        chi = ((counts - wanted)[many] ** 2 / wanted[many]).sum()
        assert float(chi) < int(many.sum()) + 4 * (2 * int(many.sum())) ** 0.5
    rows, weights = sampler.draw(200, 40, generator)
    assert len(rows) == 40 and float(weights.sum()) == pytest.approx(1.0)
    assert all(len(set(part.tolist())) == 10 for part in rows.split(10))


def test_nearest_rows_are_always_the_same_and_too_few_are_refused() -> None:
    x = numbers(30, 2)
    distances = distances_to_centres(x, 3, 0)
    sampler = Nearest(distances)
    one, other = (sampler.draw(30, 6, torch.Generator().manual_seed(k))[0] for k in (0, 1))
    assert torch.equal(one, other) and set(distances[one[:2], 0].tolist()) == set(
        distances[:, 0].sort()[0][:2].tolist()
    )
    with pytest.raises(InfluenceError, match="batch_size=200 asks for 66 rows of a class; there are 30"):
        sampler.draw(30, 200, torch.Generator())


@pytest.mark.parametrize("sampler", ["curvature", "logit", "distance", "topk"])
def test_samplers_run_from_settings(sampler: str) -> None:
    found = problem()
    scores = found.run(IF(solver="lissa", damping=0.05, sampler=sampler, batch_size=30, iterations=60))  # type: ignore[arg-type]
    assert np.isfinite(scores.scores).all()


@pytest.mark.long
def test_gradients_that_are_not_stored_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = problem().run(IF(solver="pcg", damping=DAMPING, tol=1e-10)).scores
    monkeypatch.setattr("ine_callback.methods.influence.fisher.MAX_BYTES", 100)
    found = problem()
    made: Curvature = curvature(found, IF(solver="pcg", damping=DAMPING))
    assert not made.fisher.stored
    again = problem().run(IF(solver="pcg", damping=DAMPING, tol=1e-10))
    assert relative(again.scores, kept) < 1e-9
    stochastic = problem().run(IF(solver="astra", damping=DAMPING, batch_size=16, iterations=200))
    assert relative(stochastic.scores, kept) < 0.3


def test_drawn_labels_are_the_same_in_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ine_callback.methods.influence.fisher.MAX_BYTES", 100)
    made = curvature(problem(), IF(solver="cg", damping=DAMPING, fisher="sampled"), "sampled")
    system = made.system()
    x = numbers(1, system.space.size)
    assert torch.equal(system.product(x), system.product(x))
    some = torch.arange(40)
    one, other = (system.product(x, some, draw=k) for k in (1, 2))
    assert not torch.equal(one, other)


def test_queries_of_low_rank_in_chunks_are_nearly_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = problem().run(IF(damping=DAMPING)).scores
    monkeypatch.setattr("ine_callback.methods.influence.run.MAX_BYTES", 10)  # a query at a time
    assert relative(problem().run(IF(damping=DAMPING, query_rank=99)).scores, whole) < 1e-12
    errors = [relative(problem().run(IF(damping=DAMPING, query_rank=rank)).scores, whole) for rank in (1, 2)]
    assert errors[1] < errors[0] and errors[1] < 0.3
    exact = problem().run(IF("exact", damping=DAMPING, query_rank=2, groups={"a": [1, 2]}))
    wanted = problem().run(IF("exact", damping=DAMPING, groups={"a": [1, 2]}))
    assert relative(getattr(exact, "newton a"), getattr(wanted, "newton a")) < 1e-10


@pytest.mark.parametrize("rank", [1, 3])
def test_products_of_low_rank_are_those_of_the_directions(rank: int) -> None:
    groups, out, inputs, positions = 2, 5, 4, 3
    outer = Outer(numbers(6, groups, positions, inputs), numbers(6, groups, positions, out)).with_bias()
    lookup = Lookup(torch.randint(7, (6, positions)), numbers(6, positions, 4), 7)
    for one, rows, columns in ((outer, out, inputs + 1), (lookup, 7, 4)):
        g = groups if one is outer else 1
        left, right = numbers(2, g, rows, rank), numbers(2, g, rank, columns)
        assert relative(one.low_rank_signals(left, right), one.signals(left @ right)) < 1e-12
        assert one.positions == positions


def test_the_whole_fisher_is_factorised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("ine_callback.methods.influence.solvers.exact")  # the package has a function of that name
    made, original = [], module.dense_fisher

    def counted(system: System) -> Tensor:
        made.append(1)
        return original(system)  # type: ignore[no-any-return]

    monkeypatch.setattr(module, "dense_fisher", counted)
    monkeypatch.setattr("ine_callback.methods.influence.run.MAX_BYTES", 10)  # a query at a time
    problem().run(IF("exact", damping=DAMPING, rescale="rif", groups={"a": [1, 2]}, query_rank=99))
    assert len(made) == 1
