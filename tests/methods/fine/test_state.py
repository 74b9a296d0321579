"""f-INE in a run: its state is saved, grown and kept under its cap, odd steps inform nothing, mistakes are named."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ine_callback.methods.fine import fine as module
from ine_callback.methods.fine import null as null_module
from ine_callback.methods.fine.fine import FINE
from ine_callback.scores import Scores
from ine_callback.stats.hypothesis_tests import uniformity_p
from tests.helpers.null_runs import CPU, infos, scores, steps


def equal(one: Scores, other: Scores) -> None:
    for field in dataclasses.fields(Scores)[1:]:
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


@pytest.mark.parametrize("estimator", ["gaussian", "auc", "max_threshold"])
def test_resumed_run_equals_uninterrupted_run(estimator: module.Estimator, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = list(steps(25, 6, 40))
    whole = scores(FINE(estimator), iter(run), 25)
    first = FINE(estimator)
    first.start(25, infos(2), CPU)
    for step in run[:17]:
        first.update(*step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    snapshot = first.state_dict()
    for step in run[17:]:
        first.update(*step)
    equal(first.compute(), whole)
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), snapshot):
        second = FINE(estimator)
        second.start(25, infos(2), CPU)
        second.load_state_dict(state)
        for step in run[17:]:
            second.update(*step)
        equal(second.compute(), whole)


def test_finish_may_be_called_during_the_run() -> None:
    run, fine = list(steps(25, 6, 40)), FINE()
    fine.start(25, infos(2), CPU)
    for step in run:
        fine.update(*step)
        if len(run) > 30:
            fine.compute()
    equal(fine.compute(), scores(FINE(), iter(run), 25))


def test_grown_state_equals_one_that_was_large_from_the_start() -> None:
    run = list(steps(25, 6, 40))
    fine = FINE("auc")
    fine.start(0, infos(2), CPU)
    for rows, signals, rate in run:
        fine.grow(int(rows.max()) + 1)
        fine.update(rows, signals, rate)
    fine.grow(25)
    equal(fine.compute(), scores(FINE("auc"), iter(run), 25))


def test_null_stays_under_its_cap_and_keeps_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(null_module, "MAX_NULL_DRAWS", 256)
    fine = FINE()
    fine.start(10, infos(1), CPU)
    assert fine.state_dict()["null"].shape == (11, 21, 1)
    for step in steps(10, 5, 20, 1):
        fine.update(*step)
    fine.grow(100)
    assert fine.state_dict()["null"].shape == (101, 3, 1)
    fine.grow(500)
    assert fine.state_dict()["null"].shape == (126, 3, 1)
    for step in steps(500, 100, 20, 1):
        fine.update(*step)
    every_fourth = fine.state_dict()["null"][:-1]
    fine.grow(1000)
    state = fine.state_dict()
    assert torch.equal(state["null"][:63], every_fourth[::2])
    assert (state["stride"], state["draws"], state["null"].shape[0]) == (8, 2, 126)
    for step in steps(1000, 100, 200, 1, heavy=True):
        fine.update(*step)
    found = fine.compute()
    assert uniformity_p(found.p) > 0.001 and found.null_ks_p[0] > 0.01
    resumed = FINE()
    resumed.start(1000, infos(1), CPU)
    resumed.load_state_dict(fine.state_dict())
    equal(resumed.compute(), found)


def test_nonfinite_signals_are_left_out_per_query_and_counted() -> None:
    clean = list(steps(20, 6, 60))
    dirty = [(r, c.clone(), rate) for r, c, rate in clean]
    for value, at in ((math.nan, 3), (math.inf, 9), (-math.inf, 9), (1e30, 20)):
        dirty[at][1][int(value == -math.inf), 1] = value
    fine = FINE("auc")
    found = scores(fine, iter(dirty), 20)
    base = scores(FINE("auc"), iter(clean), 20)
    assert fine.nonfinite.tolist() == [0, 4]
    np.testing.assert_array_equal(found.mu[:, 0], base.mu[:, 0])
    seen = base.observations > 0
    assert np.isfinite(found.mu[seen]).all() and np.isfinite(found.p[seen]).all()
    part = scores(FINE(), iter([(torch.arange(4), torch.tensor([[1.0], [2.0], [math.nan], [6.0]]), 1.0)]), 4, 1)
    np.testing.assert_allclose(part.mu[:, 0] * math.sqrt(4 * 7.0), [-3, -1.5, 0, 4.5], rtol=1e-6)


def test_query_without_a_finite_or_varying_signal_is_nan_and_harms_no_other() -> None:
    run = [
        (r, torch.stack([c[:, 0], torch.full((6,), v)], 1), rate)
        for r, c, rate in steps(20, 6, 60)
        for v in (math.nan,)
    ]
    found = scores(FINE(), iter(run), 20)
    np.testing.assert_allclose(found.mu[:, 0], scores(FINE(), steps(20, 6, 60), 20).mu[:, 0])
    for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd"):
        assert np.isnan(getattr(found, name)[:, 1]).all(), name
    assert math.isnan(found.null_ks_p[1])


def test_single_row_steps_and_rate_zero_count_but_inform_nothing() -> None:
    run = list(steps(20, 6, 60))
    idle = [(torch.tensor([4]), torch.tensor([[50.0, -3.0]]), 0.1), (torch.arange(6), torch.randn(6, 2), 0.0)]
    base, found = scores(FINE(), iter(run), 20), scores(FINE(), iter(run[:30] + idle + run[30:]), 20)
    assert found.observations[4] == base.observations[4] + 2
    for name in ("mu", "p", "t", "se"):
        np.testing.assert_array_equal(getattr(found, name), getattr(base, name))
    alone = scores(FINE(), iter([(torch.tensor([k % 3]), torch.randn(1, 2), 0.1) for k in range(9)]), 3)
    assert alone.observations.tolist() == [3, 3, 3] and np.isnan(alone.mu).all() and np.isnan(alone.p).all()


def test_unseen_rows_are_nan_and_one_observation_has_no_t() -> None:
    run = [(torch.tensor([0, 1, 2]), torch.randn(3, 1), 0.1), (torch.tensor([0, 1, 3]), torch.randn(3, 1), 0.1)]
    found = scores(FINE(), iter(run), 5, 1)
    assert found.observations.tolist() == [2, 2, 1, 1, 0]
    for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd"):
        assert math.isnan(getattr(found, name)[4, 0]), name
    assert np.isnan(found.t[2:]).all() and np.isfinite(found.t[:2]).all()
    assert np.isfinite(found.p[:4]).all()
    empty = scores(FINE("auc"), iter([]), 5)
    assert np.isnan(empty.mu).all() and empty.null_mu.shape == (2, 0) and np.isnan(empty.null_ks_p).all()


def test_duplicate_rows_of_a_step_count_twice() -> None:
    found = scores(FINE(), iter([(torch.tensor([0, 0, 1]), torch.tensor([[2.0], [3.0], [1.0]]), 1.0)]), 2, 1)
    assert found.observations.tolist() == [2, 1]
    np.testing.assert_allclose(found.mu[:, 0] * math.sqrt(3 * 1.0), [1.5, -1.5], rtol=1e-6)


def test_global_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    scores(FINE("auc"), steps(20, 6, 20), 20)
    assert torch.equal(torch.get_rng_state(), before)
    seeds = [scores(FINE(seed=s), steps(20, 6, 20), 20) for s in (0, 0, 1)]
    equal(seeds[0], seeds[1])
    assert (seeds[0].null_mu != seeds[2].null_mu).any() and np.array_equal(seeds[0].mu, seeds[2].mu, equal_nan=True)


class _HostReads(TorchDispatchMode):
    """Refuses every operation that waits for the device or whose shape depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"}, name
        if name in {"index", "index_put_"}:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean indexing"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["gaussian", "auc", "max_threshold"])
def test_fold_never_waits_for_the_device_and_allocates_nothing_lasting(estimator: module.Estimator) -> None:
    fine = FINE(estimator)
    fine.start(20, infos(2), CPU)
    before = {name: (value.data_ptr(), value.shape) for name, value in fine._state.items()}
    run = list(steps(20, 6, 20))
    with _HostReads():
        for step in run:
            fine.update(*step)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            run[0][1].sum().item()
    assert {name: (value.data_ptr(), value.shape) for name, value in fine._state.items()} == before


def test_half_precision_signals_and_gradient_graphs_are_accepted() -> None:
    run = [(r, c.to(torch.bfloat16).requires_grad_(), rate) for r, c, rate in steps(20, 6, 30)]
    found = scores(FINE(), iter(run), 20)
    base = scores(FINE(), ((r, c.detach().double(), rate) for r, c, rate in run), 20)
    np.testing.assert_allclose(found.mu, base.mu, rtol=1e-5)


def test_mistakes_are_named_with_their_remedy() -> None:
    with pytest.raises(ValueError, match=r"estimator='mean'.*gaussian"):
        FINE("mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="null_draws=0"):
        FINE(null_draws=0)
    with pytest.raises(ValueError, match="seed=-1"):
        FINE(seed=-1)
    fine = FINE()
    with pytest.raises(RuntimeError, match=r"FINE.update: no state yet; call start"):
        fine.update(torch.arange(2), torch.zeros(2, 1), 0.1)
    with pytest.raises(ValueError, match="queries is empty"):
        fine.start(3, (), CPU)
    fine.start(3, infos(2), CPU)
    with pytest.raises(ValueError, match=r"signals \(2, 1\)"):
        fine.update(torch.arange(2), torch.zeros(2, 1), 0.1)
    with pytest.raises(ValueError, match="rate=nan"):
        fine.update(torch.arange(2), torch.zeros(2, 2), math.nan)
    other = FINE("auc")
    other.start(3, infos(2), CPU)
    with pytest.raises(ValueError, match="resume with the same settings"):
        other.load_state_dict(fine.state_dict())


def test_command_line_configuration_builds_the_method() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FINE, "fine")
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    built = build(parser.parse_args(["--fine.estimator=auc", "--fine.null_draws=5"])).fine
    assert (built.estimator, built.null_draws, built.seed) == ("auc", 5, 0)
    with pytest.raises(Exception, match="estimator"):
        parser.parse_args(["--fine.estimator=mean"])
