"""Several optimizers: one observation a batch, nobody else's gradients, no trace left in the training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from ine_callback import InfluenceReport, Recorder
from ine_callback.errors import InfluenceError
from ine_callback.methods.observation_counts import ObservationCounts
from tests.helpers.identical import unequal

ROWS, SIZE, EPOCHS = 24, 6, 4
X = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (ROWS,), generator=torch.Generator().manual_seed(2))
EXACT = {"discount": False, "initial_weights": "fixed", "refresh_every": 1}


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(EPOCHS):
        yield from torch.randperm(ROWS, generator=generator).split(SIZE)


def loss_of(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def together(make: Callable[[nn.Sequential], list[torch.optim.Optimizer]], **options: Any) -> InfluenceReport:
    """All optimizers step after one backward pass, outside of the recorded batch."""
    module = network()
    optimizers = make(module)
    steps = ROWS // SIZE * EPOCHS
    keep = Recorder(module, optimizers, ROWS, {"all": (X, Y), "self": "self"}, loss_of, total_steps=steps, **options)
    with keep:
        for rows in batches():
            with keep.batch(rows, (X[rows], Y[rows])):
                loss = loss_of(module, (X[rows], Y[rows]))
                keep.see(loss)
                loss.backward()
                keep.after_backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    return keep.report()


def one(module: nn.Sequential) -> list[torch.optim.Optimizer]:
    return [
        SGD([{"params": module[0].parameters()}, {"params": module[2].parameters(), "lr": 0.2}], lr=0.1, momentum=0.5)
    ]


def two(module: nn.Sequential) -> list[torch.optim.Optimizer]:
    return [SGD(module[0].parameters(), lr=0.1, momentum=0.5), SGD(module[2].parameters(), lr=0.2, momentum=0.5)]


@pytest.mark.parametrize("options", [EXACT, {}], ids=["no discount", "with discount and closing pass"])
def test_two_optimizers_are_two_parameter_groups(options: Any) -> None:
    apart, joint = together(two, **options), together(one, **options)
    for name in ("mu", "se", "p", "t", "observations", "mean_loss"):
        np.testing.assert_allclose(getattr(apart.scores, name), getattr(joint.scores, name), rtol=2e-4, atol=1e-5)
    assert apart.run.steps == joint.run.steps == ROWS // SIZE * EPOCHS
    assert apart.run.schedule == joint.run.schedule


def test_the_first_optimizers_rate_may_be_zero() -> None:
    def make(module: nn.Sequential) -> list[torch.optim.Optimizer]:
        return [SGD(module[0].parameters(), lr=0.0), SGD(module[2].parameters(), lr=0.2)]

    def alone(module: nn.Sequential) -> list[torch.optim.Optimizer]:
        return [SGD(module[2].parameters(), lr=0.2)]

    found, expected = (together(each, **EXACT, layers=["2"]).scores.mu for each in (make, alone))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def game(
    frozen: bool = False, gathered: int = 1, methods: Any = None, **options: Any
) -> tuple[Recorder, nn.ModuleDict]:
    """A GAN in a bare loop; ``frozen``: the discriminator stays frozen from the generator's turn to its own."""
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {
            "g": nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)),
            "d": nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)),
        }
    )

    def judged(x: Tensor, true: float) -> Tensor:
        logits = module["d"](x)
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, true))

    def made(x: Tensor) -> Tensor:
        return torch.cat([x[:, :3], module["g"](x[:, :3])], 1)

    def query(_: nn.Module, batch: Any) -> Tensor:
        return judged(made(batch), 1.0) + judged(batch, 1.0)

    g, d = SGD(module["g"].parameters(), lr=0.1), SGD(module["d"].parameters(), lr=0.2)
    keep = Recorder(module, [g, d], ROWS, {"both": X}, query, methods=methods, **options)
    with keep:
        for k, rows in enumerate(batches()):
            x = X[rows]
            with keep.batch(rows, x):
                module["d"].requires_grad_(True)
                d.zero_grad()
                (judged(x, 1.0) + judged(made(x).detach(), 0.0)).backward()
                keep.after_backward()
                d.step()
                if frozen:
                    module["d"].requires_grad_(False)
                if k % gathered == 0:
                    g.zero_grad()
                (judged(made(x), 1.0) / gathered).backward()
                keep.after_backward()
                if k % gathered == gathered - 1:
                    g.step()
    return keep, module


def test_who_stays_frozen_until_its_turn_keeps_its_directions() -> None:
    (frozen, one), (free, other) = game(frozen=True, **EXACT), game(**EXACT)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    np.testing.assert_allclose(frozen.report().scores.mu, free.report().scores.mu, rtol=1e-4)


def test_steps_of_one_batch_are_one_observation() -> None:
    keep, _ = game(**EXACT)
    report = keep.report()
    assert (report.observations == EPOCHS).all() and report.run.steps == keep.guard.taken == ROWS // SIZE * EPOCHS
    counted, _ = game(methods=[ObservationCounts()])
    assert (counted.report().observations == EPOCHS).all()


def test_steps_that_took_other_batches_are_observations_of_their_own() -> None:
    """The generator gathers two batches, the discriminator steps in each."""
    keep, _ = game(gathered=2, **EXACT)
    assert (keep.report().observations == 2 * EPOCHS).all()


def test_a_players_curvature_is_of_gradients_that_it_takes() -> None:
    keep, _ = game(curvature_every=1, reservoir=0)
    steps, uses = ROWS // SIZE * EPOCHS, {n: f.uses for n, f in keep.signals.curvature._factors.items()}  # type: ignore[union-attr]
    assert uses["g.0.weight"] == steps
    assert uses["d.0.weight"] == 2 * steps + 1  # true and made rows; once before it was known whose gradient it is


def test_players_have_no_loss_for_a_closing_pass() -> None:
    keep, _ = game()
    assert any("closing pass: the optimizers take turns" in note for note in keep.report().run.notes)
    assert not any("closing pass:" in note and "turns" in note for note in together(two).run.notes)


def test_losses_are_not_counted_twice() -> None:
    def counted(make: Any) -> Any:
        return together(make, methods=[ObservationCounts()]).scores.mean_loss

    found = counted(two)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, counted(one))


def test_adam_before_its_first_step_is_not_scaled_by_the_others_gradient() -> None:
    """The generator's pass leaves large gradients in the discriminator, which are removed before its own."""
    torch.manual_seed(0)
    g, d = nn.Linear(5, 5), nn.Linear(5, 1)
    module = nn.ModuleDict({"g": g, "d": d})
    optimizers = [SGD(g.parameters(), lr=0.1), Adam(d.parameters(), lr=0.01)]
    keep = Recorder(
        module,
        optimizers,
        ROWS,
        {"all": X},
        lambda m, x: m["d"](m["g"](x)).square().mean(),
        refresh_every=99,
        **{k: v for k, v in EXACT.items() if k != "refresh_every"},
    )
    with keep, keep.batch(torch.arange(6), X[:6]):
        (1000 * d(g(X[:6])).square().mean()).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        d(X[:6]).square().mean().backward()
        weight = torch.cat([p.grad.flatten() for p in d.parameters()]).square().mean().sqrt()
        optimizers[1].step()
        block = next(block for block in keep.signals.table if block.name == "d.weight")
        assert float(keep.signals._factors[block][0]) == pytest.approx(1 / float(weight), rel=1e-4)


def test_shared_parameters_are_refused() -> None:
    module = network()
    optimizers = [SGD(module.parameters(), lr=0.1), SGD(module[2].parameters(), lr=0.1)]
    with pytest.raises(InfluenceError, match=r"Recorder: two optimizers have the parameters \['2.bias', '2.weight'\]"):
        Recorder(module, optimizers, ROWS, {"all": (X, Y)}, loss_of).start()
    with pytest.raises(InfluenceError, match="there is no optimizer"):
        Recorder(module, [], ROWS, {"all": (X, Y)}, loss_of).start()


def test_an_optimizer_without_a_rule_is_named() -> None:
    class Odd(SGD):
        pass

    class Unknown(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            pass

    module = network()
    optimizers = [Odd(module[0].parameters(), lr=0.1), Unknown(module[2].parameters(), {"lr": 0.1})]
    keep = Recorder(module, optimizers, ROWS, {"all": (X, Y)}, loss_of)
    with pytest.warns(UserWarning, match="Unknown has no update rule"):
        keep.start()
    keep.stop()


def test_a_recording_is_taken_up_in_the_middle() -> None:
    """Two optimizers after one pass: the state in the middle, taken up by another recorder, ends with the same bits."""

    def run(cut: int | None) -> tuple[InfluenceReport, dict[str, Any]]:
        module = network()
        optimizers = two(module)
        state: dict[str, Any] = {}

        def new(done: int) -> Recorder:
            steps = ROWS // SIZE * EPOCHS - done
            return Recorder(module, optimizers, ROWS, {"all": (X, Y)}, loss_of, total_steps=steps)

        keep = new(0)
        keep.start()
        for k, rows in enumerate(batches()):
            if k == 9:
                state = copy.deepcopy(keep.state_dict())
                if k == cut:
                    keep.stop(closing=False)
                    keep = new(9)
                    keep.start()
                    keep.load_state_dict(state)
            with keep.batch(rows, (X[rows], Y[rows])):
                loss_of(module, (X[rows], Y[rows])).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        keep.stop(closing=False)
        return keep.report(), state

    (whole, state), (parts, _) = run(None), run(9)
    assert state["signals"]["optimizers"] == {
        "steps": [9, 9],
        "summed": pytest.approx([0.9, 1.8]),
        "updates": 9,
        "active": [9, 9],
        "by_turns": False,
    }
    assert not unequal(whole, parts)
    assert (whole.observations == parts.observations).all() and whole.run.steps == parts.run.steps
