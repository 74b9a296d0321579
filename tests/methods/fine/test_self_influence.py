"""Self-influence: a row's mean ratio to its batch, on the profile of its own steps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ine_callback.methods.fine.fine import FINE
from ine_callback.scores import QueryInfo
from tests.helpers.null_runs import CPU, infos


def own_run(random_weights: bool = True, rate: float = 0.1) -> tuple[FINE, list[tuple[Tensor, Tensor, Tensor]]]:
    """12 rows, 4 shuffled epochs in batches of 4; the signals shrink tenfold an epoch, each row has its own unit."""
    self_query = QueryInfo("self", "self", "?")
    fine, g = FINE(), torch.Generator().manual_seed(0)
    fine.start(12, (*infos(1), self_query), CPU, random_weights)
    run = []
    for epoch in range(4):
        for rows in torch.randperm(12, generator=g).split(4):
            signals = torch.rand(4, 2, generator=g) / 10**epoch
            units = torch.rand(4, 2, generator=g) + 0.5
            units[:, 0] = 2.0
            fine.update(rows, signals, rate, units)
            run.append((rows, signals, units))
    return fine, run


def test_self_influence_is_the_mean_ratio_to_the_batch_on_the_rows_own_profile() -> None:
    fine, run = own_run()
    ratios, profile, others = torch.zeros(12), torch.zeros(12), torch.zeros(12)
    for rows, signals, units in run:
        predicted = 0.1 * signals[:, 1] / units[:, 1]
        mean = predicted.mean()
        for k, row in enumerate(rows):
            rest = (predicted.sum() - predicted[k]) / 3
            ratios[row] += (predicted[k] - rest) / mean / 4
            profile[row] += mean
        d = 0.1 * signals[:, 0] / 2.0
        others[rows] += d - (d.sum() - d) / 3
    found = fine.compute()
    np.testing.assert_allclose(found.mu[:, 1], ratios * profile, rtol=2e-5)
    np.testing.assert_allclose(found.mu[:, 0], others, rtol=2e-5, atol=1e-7)
    (note,) = fine.notes()
    assert f"{float(profile.mean()):.2g} standard deviations" in note


def test_self_influence_does_not_depend_on_how_signals_shrink() -> None:
    """Its tests and its ranking are those of ratios: a common factor of a step drops out of t."""
    fine, run = own_run()
    other = FINE()
    other.start(12, (*infos(1), QueryInfo("self", "self", "?")), CPU, True)
    for step, (rows, signals, units) in enumerate(run):
        other.update(rows, signals * (1 + step), 0.1, units)
    np.testing.assert_allclose(other.compute().t[:, 1], fine.compute().t[:, 1], rtol=1e-4)
    assert not np.allclose(other.compute().t[:, 0], fine.compute().t[:, 0], rtol=1e-2)


def test_self_influence_of_a_climbing_run_is_the_negative() -> None:
    found, climbing = own_run()[0].compute(), own_run(rate=-0.1)[0].compute()
    np.testing.assert_array_equal(climbing.mu, -found.mu)
    np.testing.assert_array_equal(climbing.t, -found.t)


def test_self_influence_survives_a_checkpoint_and_growth() -> None:
    fine, _ = own_run()
    again = FINE()
    again.start(20, (*infos(1), QueryInfo("self", "self", "?")), CPU, True)
    again.load_state_dict(fine.state_dict())
    np.testing.assert_array_equal(again.compute().mu[:12], fine.compute().mu)
    assert np.isnan(again.compute().mu[12:]).all()


def test_only_self_influence_from_random_weights_has_a_note() -> None:
    fine = FINE()
    fine.start(3, infos(1), CPU, True)
    assert fine.notes() == []
    assert own_run(random_weights=False)[0].notes() == []
