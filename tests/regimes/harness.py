"""One regime, three checks: scores against the reference, training against a run without us, every row counted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from ine_callback import InfluenceCallback, InfluenceReport
from tests.helpers.identical import History, differing, fitted

from .reference import Event, replay
from .regime import EPOCHS, Classifier, Data, Regime

QUIET = {
    "accelerator": "cpu",
    "max_epochs": EPOCHS,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Watch(L.Callback):
    """Notes the events of a run for the reference."""

    def __init__(self, data: Data) -> None:
        self.data, self.events = data, []
        self._handles: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._optimizers = trainer.optimizers
        self._handles = [each.register_step_post_hook(self._stepped) for each in trainer.optimizers]
        if len(trainer.optimizers) > 1:  # no hook tells of zero_grad under manual optimization
            for k, each in enumerate(pl_module.optimizers()):
                each.zero_grad = partial(self._zeroed, k, each.zero_grad)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int) -> None:
        self._rows = [int(row) for row in self.data.rows_of(batch)]
        self._random = torch.get_rng_state()

    def on_before_zero_grad(self, *_: Any) -> None:
        self.events.append(Event("zero"))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        trainable = frozenset(plain_name(name) for name, p in pl_module.named_parameters() if p.requires_grad)
        groups = _settings(trainer.optimizers)
        changes = any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks)
        accumulate = trainer.accumulate_grad_batches if changes else None
        which = getattr(pl_module, "turn", "loss")
        event = Event("backward", self._rows, self._random, groups, trainable, accumulate=accumulate, loss=which)
        self.events.append(event)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if len(trainer.optimizers) > 1:
            self.events.append(Event("end"))
        elif not pl_module.automatic_optimization and all(p.grad is None for p in pl_module.parameters()):
            self.events.append(Event("zero"))

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        k = self._optimizers.index(optimizer)
        self.events.append(Event("step", groups=_settings(self._optimizers), optimizer=k))

    def _zeroed(self, k: int, zero_grad: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self.events.append(Event("zero", optimizer=k))
        zero_grad(*args, **kwargs)

    def on_train_end(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


def plain_name(parameter: str) -> str:
    """Without what torch.compile adds to a name."""
    return parameter.replace("._orig_mod", "")


def _settings(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [{k: v for k, v in group.items() if k != "params"} for group in groups]


@dataclass
class Run:
    """A real ``Trainer.fit``: what it left, what happened, the module before and after."""

    left: dict[str, list[Any]]
    events: list[Event]
    data: Data
    first: Classifier
    last: torch.nn.Module


@dataclass
class Verdict:
    """What the checks found.

    Attributes:
        error: Relative error of each query's scores.
        drift: Relative distance of the run's last weights to the reference's: whether they trained alike at all.
        changed: What the callback changed about the training.
        lost: Visits that the training made, minus visits counted [N].
        report: The report.
        warned: Our own warnings.
    """

    error: dict[str, float]
    drift: float
    changed: list[str]
    lost: list[int]
    report: InfluenceReport
    warned: list[str]


def fit(regime: Regime, influence: InfluenceCallback | None) -> Run:
    """Trains once, with or without the callback."""
    L.seed_everything(11, verbose=False)
    torch.compiler.reset()  # the shapes of runs before would change what is compiled
    data, module = regime.data(), regime.module()
    first, watch, history = copy.deepcopy(module), Watch(data), History()
    options = {**QUIET, **regime.trainer()}
    own = [] if influence is None else [influence]
    trainer = L.Trainer(**options | {"callbacks": [*own, *options.get("callbacks", []), watch, history]})
    trainer.fit(module, data.train, data.val)
    return Run(fitted(trainer, history), watch.events, data, first, trainer.lightning_module)


def recorder(regime: Regime) -> InfluenceCallback:
    """The callback as the reference computes: no discount, first weights fixed."""
    options = {"discount": False, "refresh_every": 1, "initial_weights": "fixed", "on_error": "raise"}
    return InfluenceCallback(["val", "self"], **options | regime.influence)


def examine(regime: Regime) -> Verdict:
    """Runs a regime with and without the callback, and its reference."""
    if regime.processes > 1:
        from .together import examine_together  # the other way around it runs what is here

        return examine_together(regime)
    influence = recorder(regime)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorded = fit(regime, influence)
    assert influence.report is not None
    warned = [str(w.message) for w in caught if "InfluenceCallback" in str(w.message)]
    return judged(regime, fit(regime, None), recorded.left, influence.report, warned)


def judged(
    regime: Regime, plain: Run, left: dict[str, list[Any]], report: InfluenceReport, warned: list[str], parts: int = 1
) -> Verdict:
    """What a recorded run found and left, against a plain run and its replay."""
    passes = [event for event in plain.events if event.kind == "backward"]
    for number in regime.unfamiliar:
        passes[number].counts = False
    mu, trained = replay(regime, plain.first, plain.data, plain.events, parts)
    return Verdict(
        error=_errors(report.scores.mu, mu.numpy()),
        drift=_drift(plain.last, trained),
        changed=differing(plain.left, left),
        lost=(_visits(plain.events, report.rows) - report.observations).tolist(),
        report=report,
        warned=warned,
    )


def _errors(found: Any, expected: Any) -> dict[str, float]:
    """Relative to the reference; rows without a score must be the same in both."""
    assert found.shape == expected.shape and (np.isnan(found) == np.isnan(expected)).all()
    off, size = (np.linalg.norm(np.nan_to_num(part), axis=0) for part in (found - expected, expected))
    return {name: float(off[k] / size[k]) for k, name in enumerate(("val", "self"))}


def _drift(trained: torch.nn.Module, reference: torch.nn.Module) -> float:
    pairs = list(zip(trained.parameters(), reference.parameters(), strict=True))
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (off / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


def _visits(events: list[Event], rows: int) -> Any:
    """Visits [N] of every row in steps that were applied; of several optimizers, in batches with a step."""
    total, pending = np.zeros(rows, dtype=np.int64), []
    if any(event.kind == "end" for event in events):
        return _visits_of_batches(events, total)
    for event in events:
        if event.kind == "backward":
            pending += event.rows if event.counts else []
        else:
            if event.kind == "step":
                np.add.at(total, pending, 1)
            pending = []
    return total


def _visits_of_batches(events: list[Event], total: Any) -> Any:
    present: list[int] = []
    stepped = False
    for event in events:
        if event.kind == "end":
            np.add.at(total, present if stepped else [], 1)
            stepped = False
        present = event.rows or present
        stepped |= event.kind == "step"
    return total


def shortcomings(regime: Regime, verdict: Verdict) -> list[str]:
    """What a regime failed in; empty where all is well."""
    run = verdict.report.run
    out = [f"{q}: relative error {e:.1e}" for q, e in verdict.error.items() if not e <= regime.tolerance]
    out += [f"training changed: {kind}" for kind in verdict.changed]
    out += [f"visits lost: {verdict.lost}"] if any(verdict.lost) else []
    left_out = {plain_name(name) for name in run.uncaptured}
    out += [f"left out {sorted(left_out)}"] if left_out != set(regime.left_out) else []
    out += [f"approximate {sorted(run.approximate)}"] if set(run.approximate) != set(regime.approximate) else []
    out += [] if regime.note in "\n".join(run.notes) else [f"no note with '{regime.note}': {run.notes}"]
    return out
