"""The rules against steps of the real optimizers: a row's effect on a query, weight decay, schedules, directions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from ine_callback.optimizers.registry import known, rate_of, step_rate
from tests.helpers.optimizers import LINEAR, NONLINEAR, Case, Lion, grads

ALL = {**LINEAR, **NONLINEAR}


def block() -> list[nn.Parameter]:
    """A matrix with singular values that are all the same, and no element 0."""
    return [nn.Parameter(torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64))]


def query(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.flatten() for p in parameters]).sin().mul(torch.arange(1.0, 5.0)).sum()


def lowered_by(case: Case, contribution: Tensor, options: dict[str, Any], steps: int = 200) -> tuple[float, float]:
    """What a row's contribution lowers the query by: as the rule predicts, and in the real optimizer."""
    ends = []
    for part in (0.0, 1e-6):
        (p,) = parameters = block()
        optimizer = case.frozen(parameters, **options)
        for t in range(steps):
            grads(optimizer, torch.zeros_like)
            if t == 0:
                p.grad = part * contribution
                rate = rate_of(optimizer, parameters)
                (slope,) = torch.autograd.grad(query(parameters), parameters)
            optimizer.step()
        ends.append(query(parameters).item())
    return float(rate.step * rate.weight * (slope * contribution).sum()), (ends[0] - ends[1]) / 1e-6


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
def test_a_rows_effect_on_a_query_through_all_later_steps(case: Case, maximize: bool) -> None:
    """The scaling does not move, so direction times step is exact to first order; the momentum runs out."""
    contribution = torch.tensor([[0.3, -0.1], [0.7, 0.2]], dtype=torch.float64)
    predicted, real = lowered_by(case, contribution, {"lr": 0.02, "maximize": maximize, "weight_decay": 0.0})
    assert predicted == pytest.approx(real, rel=1e-5)
    assert (predicted > 0) != maximize


LIMITED = {"Adafactor": {"lr": 0.5}, "Adafactor, small weights": {"lr": 0.01, "eps": (None, 3.0)}}


@pytest.mark.skipif("Adafactor" not in LINEAR, reason="torch has no Adafactor")
@pytest.mark.parametrize("options", LIMITED.values(), ids=LIMITED)
def test_adafactors_step_is_limited_and_relative_to_the_weights(options: dict[str, Any]) -> None:
    contribution = torch.tensor([[0.3, -0.1], [0.7, 0.2]], dtype=torch.float64)
    predicted, real = lowered_by(LINEAR["Adafactor"], contribution, options)
    assert predicted == pytest.approx(real, rel=1e-5)


def settled(name: str) -> dict[str, Any]:
    """Options of usual averages, which start at 0 and are or are not corrected."""
    return {
        "Adafactor": {},
        "Adagrad": {"initial_accumulator_value": 0.3, "lr_decay": 0.2, "eps": 0.01},
        "Adadelta": {"rho": 0.9, "eps": 1e-3},
        "RMSprop": {"alpha": 0.9, "eps": 0.01},
        "RMSprop, centered": {"alpha": 0.9, "eps": 0.01, "centered": True},
        "Adam": {"betas": (0.9, 0.99), "eps": 0.01},
        "Adamax": {"betas": (0.9, 0.99), "eps": 0.01},
        "RAdam": {"betas": (0.9, 0.99), "eps": 0.01},
        "RAdam, unrectified": {"betas": (0.9, 0.99)},
        "ASGD": {"lambd": 0.0, "alpha": 0.75},
    }.get(name, ALL[name].options if name in ALL else {})


STEADY = ["Adam", "Adamax", "RAdam", "RMSprop", "RMSprop, centered", "Adagrad", "Adadelta", "ASGD", *NONLINEAR]
STEADY += ["Adafactor"] if "Adafactor" in LINEAR else []


@pytest.mark.parametrize("before", [0, 1, 4, 60])
@pytest.mark.parametrize("name", STEADY)
def test_a_step_of_steady_gradients_is_the_gradient_times_the_scalar(name: str, before: int) -> None:
    """All |g| are the same, at all steps: sums and averages are then what the rule expects, also at the start.

    The learning rate follows a schedule, whose present value counts.
    """
    if name in ("Lion", "Muon") and before < 60:
        before = 80  # their averages start at 0, and no step is counted
    if name == "RMSprop, centered":
        before = min(before, 20)  # later nothing is left but rounding
    (p,) = parameters = block()
    steady = 0.3 * torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    optimizer = ALL[name].kind(parameters, lr=0.02, **settled(name))
    schedule = lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + 0.1 * t))
    grads(optimizer, lambda p: steady.clone())
    for _ in range(before):
        optimizer.step()
        schedule.step()
    rate = rate_of(optimizer, parameters)
    assert rate.lr == pytest.approx(optimizer.param_groups[0]["lr"])
    old = p.detach().clone()
    optimizer.step()
    expected = -float(rate.step * rate.weight) * steady
    torch.testing.assert_close(p.detach() - old, expected, rtol=2e-2 if name == "Muon" else 2e-6, atol=0)


DECAYING = [name for name in ALL if name != "Rprop"]  # it has no weight decay


@pytest.mark.parametrize("name", DECAYING)
def test_decay_is_the_exponent_of_repeated_weight_decay(name: str) -> None:
    """w fades as exp(-sum of lr times decay), under a schedule; of ASGD by lambd too."""
    case, steps, decay = ALL[name], 4000, 1e-4  # small gradients: the scaling stays
    parameters = block()
    more = {"lambd": 3e-4} if name == "ASGD" else {}
    state = {k: v for k, v in case.state.items() if k != "eta"}
    optimizer = Case(case.kind, case.options, state).frozen(parameters, lr=1e-5, weight_decay=decay, **more)
    if "Lion" in name or "Muon" in name:
        optimizer.state.clear()
    schedule = lr_scheduler.LambdaLR(optimizer, lambda t: 1 + t / steps)
    summed = 0.0
    for t in range(steps):
        if t == steps // 2:  # past the momentum's own start
            half, summed, rate = parameters[0].detach().clone(), 0.0, rate_of(optimizer, parameters)
        summed += optimizer.param_groups[0]["lr"]
        grads(optimizer, torch.zeros_like)
        optimizer.step()
        schedule.step()
    faded = -(parameters[0].detach() / half).log().mean().item()
    assert faded == pytest.approx(summed * float(rate.decay), rel=2e-3)
    assert faded > 1e-7


def test_lions_decay_may_be_relative_to_the_initial_learning_rate() -> None:
    p = block()
    optimizer = Lion(p, lr=0.02, weight_decay=0.001, decoupled_weight_decay=True)
    optimizer.param_groups[0]["lr"] = 0.01
    old = p[0].detach().clone()
    grads(optimizer, torch.zeros_like)
    assert rate_of(optimizer, p).decay == pytest.approx(0.05)
    optimizer.step()
    assert math.log(float(old[0, 0] / p[0].detach()[0, 0])) == pytest.approx(0.01 * 0.05, rel=1e-3)


@pytest.mark.parametrize("name", ["Lion", "Muon"])
def test_maximize_turns_the_effective_rate(name: str) -> None:
    if name not in ALL:
        pytest.skip("torch has no Muon")
    p = block()
    grads(optimizer := ALL[name].make(p, lr=0.1), torch.ones_like)
    optimizer.param_groups[0]["maximize"] = True
    assert step_rate(optimizer) == rate_of(optimizer, p).step == -0.1


# -- the scalar of a block whose elements differ ----------------------------------------------------------------------


def two() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(3, 2).double()), nn.Parameter(torch.randn(3).double())]


def flat(values: list[Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in values])


def run(optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """Random gradients; returns each step's, of all elements."""
    seen = []
    for _ in range(steps):
        grads(optimizer, torch.randn_like)
        seen.append(flat([p.grad for g in optimizer.param_groups for p in g["params"]]).clone())
        optimizer.step()
    return seen


def average(values: list[Tensor], beta: float) -> Tensor:
    kept = torch.zeros_like(values[0])
    for value in values:
        kept = beta * kept + (1 - beta) * value
    return kept


def squares(seen: list[Tensor]) -> list[Tensor]:
    return [g.square() for g in seen]


def test_rmsprops_scalar_is_one_over_the_blocks_rms_gradient() -> None:
    p = two()
    optimizer = torch.optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-3, momentum=0.5, weight_decay=0.0)
    v = average(squares(run(optimizer, 5)), 0.9).mean() / (1 - 0.9**5)
    rate = rate_of(optimizer, p)
    assert float(rate.weight) == pytest.approx(float(1 / ((v * (1 - 0.9**6)).sqrt() + 1e-3)), rel=1e-5)
    assert float(rate.curvature) == pytest.approx(2 * float(1 / (v.sqrt() + 1e-3)), rel=1e-5)
    assert rate.step == pytest.approx(0.02)


def test_adagrads_scalar_is_one_over_the_root_of_the_blocks_mean_sum() -> None:
    p = two()
    optimizer = torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.4, eps=1e-3, lr_decay=0.1)
    added = torch.stack(squares(run(optimizer, 5))).sum(0).mean() * 6 / 5
    expected = float(1 / ((0.4 + added).sqrt() + 1e-3)) / 1.5
    assert float(rate_of(optimizer, p).weight) == pytest.approx(expected, rel=1e-5)


def test_adadeltas_scalar_is_the_root_of_the_ratio_of_the_blocks_means() -> None:
    p = two()
    optimizer = torch.optim.Adadelta(p, lr=0.5, rho=0.9, eps=1e-2)
    run(optimizer, 5)
    v, d = (flat([optimizer.state[q][name] for q in p]).mean() for name in ("square_avg", "acc_delta"))
    rate = rate_of(optimizer, p)
    grown = v * (1 - 0.9**6) / (1 - 0.9**5)
    assert float(rate.weight) == pytest.approx(float(((d + 1e-2) / (grown + 1e-2)).sqrt()), rel=1e-5)
    v, d = v / (1 - 0.9**5), d / (1 - 0.9**5)
    assert float(rate.curvature) == pytest.approx(float(((d + 1e-2) / (v + 1e-2)).sqrt()), rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam])
def test_the_scalar_of_adams_relatives_is_adams(kind: Any) -> None:
    p = two()
    optimizer = kind(p, lr=0.01, betas=(0.8, 0.9), eps=1e-3)
    v = average(squares(run(optimizer, 30)), 0.9).mean() / (1 - 0.9**30)
    eps, rectified = 1e-3, 1.0
    if kind is torch.optim.RAdam:
        eps /= math.sqrt(1 - 0.9**31)
        rho = 19.0 - 2 * 31 * 0.9**31 / (1 - 0.9**31)
        rectified = math.sqrt((rho - 4) * (rho - 2) * 19 / (15 * 17 * rho))
    assert float(rate_of(optimizer, p).weight) == pytest.approx(rectified / float(v.sqrt() + eps), rel=1e-5)


def test_radam_does_not_scale_its_first_steps() -> None:
    p = two()
    optimizer = torch.optim.RAdam(p, lr=0.01)
    run(optimizer, 2)
    assert rate_of(optimizer, p).weight == rate_of(optimizer, p).curvature == 1.0


def test_adamaxs_scalar_is_one_over_the_root_mean_square_of_its_maxima() -> None:
    p = two()
    optimizer = torch.optim.Adamax(p, lr=0.01, betas=(0.8, 0.9), eps=1e-3)
    u = torch.zeros(9).double()
    for g in run(optimizer, 5):
        u = torch.maximum(0.9 * u, g.abs() + 1e-3)
    assert float(rate_of(optimizer, p).weight) == pytest.approx(float(1 / u.square().mean().sqrt()), rel=1e-5)


def test_lions_scalar_is_one_over_the_blocks_mean_absolute_momentum() -> None:
    p = two()
    optimizer = Lion(p, lr=0.01, betas=(0.8, 0.9))
    m = average(run(optimizer, 5), 0.9)
    assert float(rate_of(optimizer, p).weight) == pytest.approx(float(1 / m.abs().mean()), rel=1e-5)


def test_rprops_scalar_is_the_ratio_of_mean_step_and_mean_gradient_of_what_moved() -> None:
    p = two()
    optimizer = torch.optim.Rprop(p, lr=0.01)
    run(optimizer, 4)
    old = flat([q.detach() for q in p]).clone()
    (g,) = run(optimizer, 1)
    change = (flat([q.detach() for q in p]) - old).abs()
    assert (change == 0).any()  # some have turned their sign
    expected = float(change.sum() / g.abs()[change > 0].sum()) / 0.01
    assert float(rate_of(optimizer, p).weight) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif("Adafactor" not in LINEAR, reason="torch has no Adafactor")
def test_adafactors_scalar_is_the_mean_over_parameters_weighted_by_size() -> None:
    p = two()
    optimizer = torch.optim.Adafactor(p, lr=0.3)
    seen = squares(run(optimizer, 12))
    v = torch.zeros(9).double()
    for t, g in enumerate(seen, 1):
        v = v + t**-0.8 * (g - v)
    expected = 0.0
    for q, part in zip(p, (v[:6], v[6:]), strict=True):
        size = q.detach().square().mean().sqrt()
        expected += q.numel() / 9 * float(size * 13**-0.5 / 0.3 / part.mean().sqrt())
    rate = rate_of(optimizer, p)
    assert float(rate.weight) == float(rate.curvature) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif("Muon" not in NONLINEAR, reason="torch has no Muon")
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 2), (3, 5)])
def test_muons_scalar_is_the_ratio_of_the_updates_norm_and_the_buffers(shape: tuple[int, int], adjust: Any) -> None:
    p = nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.Muon([p], lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0, adjust_lr_fn=adjust)
    for _ in range(4):
        old = p.detach().clone()
        run(optimizer, 1)
    moved = (p.detach() - old).norm() / 0.1
    expected = float(moved / optimizer.state[p]["momentum_buffer"].norm())
    assert float(rate_of(optimizer, [p]).weight) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_nothing_is_known_before_the_first_gradient(case: Case) -> None:
    p = block()
    optimizer = case.make(p, lr=0.1)
    assert known(optimizer)
    plain = case.kind in (torch.optim.ASGD, torch.optim.SGD)
    assert rate_of(optimizer, p).weight == (1.0 if plain else 0.0)
