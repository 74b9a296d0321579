"""Cases of public bug reports that are no regimes: what ends a recording must not end, or change, the training."""

from __future__ import annotations

import contextlib
import copy
import io
import random
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ine_callback import FINE, IF, InfluenceCallback
from tests.helpers.identical import History, differing, fitted

from .harness import QUIET
from .public_issues import ISSUES, SOURCES, pruning
from .regime import CLASSES, FEATURES, Classifier, vectors


def fits(make: Callable[[], L.LightningModule], callbacks: Callable[[], list[Any]], **influence: Any) -> Any:
    """What a training with us leaves otherwise than one without, and our callback."""
    left, ours = [], InfluenceCallback("val", **{"on_error": "warn", **influence})
    for ending in ([], [ours]):
        data, history = vectors(), History()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        trainer = L.Trainer(callbacks=[*callbacks(), *ending, history], **QUIET)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(make(), data.train, data.val)
        left.append(fitted(trainer, history))
    return differing(*left), ours


def test_every_case_names_its_source() -> None:
    assert {regime.name for regime in ISSUES} <= SOURCES.keys() and len(SOURCES) >= 10
    assert all(source.startswith("https://github.com/") for source in SOURCES.values())


@pytest.mark.filterwarnings("ignore")
def test_pruning_with_lottery_tickets_costs_a_batch_and_leaves_the_training_alone() -> None:
    changed, ours = fits(Classifier, lambda: [pruning()])
    assert not changed
    assert ours.report is not None and not ours.report.run.uncaptured and ours.report.run.steps == 11


class Norms(Classifier):
    def __init__(self) -> None:
        norm = nn.LayerNorm(8)
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES)))


@pytest.mark.filterwarnings("ignore")
def test_a_pruned_layer_that_cannot_be_read_is_left_out_by_name_and_the_others_go_on() -> None:
    changed, ours = fits(Norms, lambda: [pruning(False)])
    assert not changed and ours.report is not None and ours.report.run.steps == 11
    told = ours.report.run.uncaptured
    assert set(told) == {"net.1.weight_orig", "net.1.bias"}
    assert all("prune" in why and "NativeLayerNorm" in why for why in told.values())


class Whole(Classifier):
    """Copies and pickles the network between epochs, and runs the copy."""

    def on_train_epoch_end(self) -> None:
        file = io.BytesIO()
        torch.save(self.net, file)
        for net in (copy.deepcopy(self.net), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
            net(torch.ones(2, FEATURES)).sum().backward()
            self.log("copied", float(sum(p.grad.sum() for p in net.parameters())))
        assert b"ine_callback" not in file.getvalue()  # who loads it may not have it


@pytest.mark.filterwarnings("ignore")
def test_a_network_can_be_copied_and_pickled_while_it_is_recorded() -> None:
    changed, ours = fits(Whole, list)
    assert not changed and ours.report is not None and ours.report.run.steps == 12


class Interrupts(L.Callback):
    """Ctrl-C in the second epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_under_weight_averaging_ends_the_same_way() -> None:
    changed, ours = fits(Classifier, lambda: [StochasticWeightAveraging(0.05, 1, 1), Interrupts()])
    assert not changed
    assert ours.report is not None and ours.report.observations.sum() > 0


class Copies(L.Callback):
    """Keeps copies of what was logged."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.kept.append(copy.deepcopy(trainer.callback_metrics))


def test_logged_metrics_can_be_copied_beside_a_normed_weight() -> None:
    def make() -> L.LightningModule:
        return Classifier(nn.Sequential(weight_norm(nn.Linear(FEATURES, 6)), nn.Tanh(), nn.Linear(6, CLASSES)))

    changed, ours = fits(make, lambda: [Copies()], on_error="raise")
    assert not changed
    assert ours.report is not None and ours.report.observations.sum() == 60


class Pooled(nn.Module):
    """A series' mean goes to the head: the last layers have no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.norm, self.head = nn.Linear(FEATURES, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.each(torch.stack([x, -x, 2 * x], 1)).tanh().mean(1)))


def test_positions_are_scored_where_some_layers_have_none() -> None:
    _, ours = fits(lambda: Classifier(Pooled()), list, methods=[FINE(), IF(per_token=True)], on_error="raise")
    assert ours.report is not None
    found = ours.report.attribution("IF-EKFAC")
    assert found is not None and found.tokens is not None
    sums = np.stack([found.tokens.of(k).sum(0) for k in range(len(found.rows))])
    assert found.tokens.of(0).shape == (3, 1) and np.allclose(sums, found.scores, rtol=1e-5, atol=1e-9)
