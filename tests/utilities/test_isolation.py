"""What runs inside ``isolated`` leaves no trace: generators, buffers, modes, metrics, attributes, logs."""

from __future__ import annotations

import collections
import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from ine_callback.utilities.isolation import isolated


class Part(nn.Module):
    """A submodule with state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.calls = nn.BatchNorm1d(3), nn.Dropout(0.5), 0
        self.seen: list[float] = []
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.mean()))
        self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)  # a new tensor each time
        return self.drop(self.norm(x))


class Stateful(L.LightningModule):
    """Everything that users keep on their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Part(), nn.Linear(3, 2)
        self.accuracy = MulticlassAccuracy(2, average="micro")
        self.more = nn.ModuleDict({"mean": MeanMetric(), "all": MetricCollection({"mean": MeanMetric()})})
        self.outputs: list[Any] = [1]
        self.sums: dict[str, Any] = {"n": 0, "nested": [1]}
        self.names, self.count, self.share, self.flag = {"a"}, 0, 0.5, False
        self.recent: collections.deque[int] = collections.deque([0], maxlen=2)
        self.table, self.running = np.zeros(3), torch.zeros(2)
        self.generator, self.numpy_generator, self.dice = torch.Generator(), np.random.default_rng(0), random.Random(0)
        self.nothing: Any = None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        x, y = batch
        logits = self.head(self.part(x + torch.randn_like(x)))
        self.accuracy.update(logits, y)
        self.more["mean"].update(logits.mean())
        self.more["all"].update(logits.mean())
        self.log("accuracy", self.accuracy)
        self.log_dict({"a": logits.mean()})
        self.outputs.append(logits)
        self.sums["n"] += 1
        self.sums["nested"].append(2)
        self.sums["new"] = logits
        self.names.add("b")
        self.recent.append(7)
        self.count, self.share, self.flag, self.nothing, self.extra = self.count + 1, 0.1, True, 3, "new"
        self.table += 1
        self.running += 1
        torch.rand(2, generator=self.generator)
        self.numpy_generator.random()
        self.dice.random()
        return logits.mean() + random.random() + float(np.random.rand())


BATCH = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])


def attributes(module: Stateful) -> dict[str, Any]:
    """All Python state, deep enough to see a leak."""
    part = module.part
    return {
        "outputs": list(module.outputs),
        "sums": {k: list(v) if isinstance(v, list) else v for k, v in module.sums.items()},
        "names": set(module.names),
        "counters": (module.count, module.share, module.flag, module.nothing, hasattr(module, "extra")),
        "table": module.table.tolist(),
        "running": module.running.tolist(),
        "recent": list(module.recent),
        "part": (part.calls, list(part.seen)),
        "own generators": (
            module.generator.get_state().tolist(),
            str(module.numpy_generator.bit_generator.state),
            module.dice.getstate(),
        ),
    }


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in [*module.named_buffers(), *module.named_parameters()]}


def metric_states(module: Stateful) -> list[Any]:
    metrics = [module.accuracy, module.more["mean"], module.more["all"]["mean"]]
    return [
        {k: torch.as_tensor(v).tolist() for k, v in m.metric_state.items()} | {"n": m._update_count} for m in metrics
    ]


def generators() -> tuple[Any, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def run(module: Stateful, fail: bool) -> None:
    try:
        with isolated(module):
            module.validation_step(BATCH)
            if fail:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fail


@pytest.fixture(params=[False, True], ids=["returns", "raises"])
def fail(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_generators(fail: bool) -> None:
    module = Stateful()
    before = generators()
    run(module, fail)
    assert generators() == before


def test_buffers_and_parameters(fail: bool) -> None:
    module = Stateful()
    module.part(torch.randn(4, 3))
    before, identities = tensors(module), {k: id(v) for k, v in module.named_buffers()}
    run(module, fail)
    after = tensors(module)
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before), [
        k for k in before if not torch.equal(before[k], after[k])
    ]
    assert {k: id(v) for k, v in module.named_buffers()} == identities


def test_recurrent_layers_stay_in_training_mode_where_that_is_the_same() -> None:
    """cuDNN differentiates them in no other."""
    layers = nn.ModuleList([nn.LSTM(2, 2), nn.GRU(2, 2, num_layers=2), nn.LSTM(2, 2, num_layers=2, dropout=0.5)])
    with isolated(layers):
        assert [layer.training for layer in layers] == [True, True, False]
    assert all(layer.training for layer in layers)


def test_modes(fail: bool) -> None:
    module = Stateful().train()
    module.part.norm.eval()
    modes = {k: m.training for k, m in module.named_modules()}
    with isolated(module):
        assert not any(m.training for m in (module, *module.part.modules(), module.head))
    with isolated(module):
        module.train()
        assert all(m.training for m in (module, *module.part.modules(), module.head))
    run(module, fail)
    assert {k: m.training for k, m in module.named_modules()} == modes


def test_metrics(fail: bool) -> None:
    module = Stateful()
    module.accuracy.update(torch.eye(2), torch.tensor([0, 0]))
    before, identity = metric_states(module), id(module.accuracy)
    run(module, fail)
    assert metric_states(module) == before and id(module.accuracy) == identity
    assert float(module.accuracy.compute()) == pytest.approx(0.5)


@pytest.mark.parametrize("name", list(attributes(Stateful())))
def test_attributes(name: str, fail: bool) -> None:
    module = Stateful()
    before = attributes(module)[name]
    run(module, fail)
    assert attributes(module)[name] == before


def test_collections_stay_the_same_objects() -> None:
    module = Stateful()
    outputs, sums, running = module.outputs, module.sums, module.running
    run(module, False)
    assert module.outputs is outputs and module.sums is sums and module.running is running


def test_logging_is_mute_and_comes_back(fail: bool) -> None:
    module = Stateful()
    log = module.log
    run(module, fail)  # without a trainer a real self.log would fail or warn
    assert module.log == log and "log" not in module.__dict__ and "log_dict" not in module.__dict__


def test_gradients_are_left_alone_and_can_be_taken() -> None:
    module = Stateful()
    module.head.weight.grad = torch.ones_like(module.head.weight)
    with torch.no_grad(), isolated(module):
        (grad,) = torch.autograd.grad(module.validation_step(BATCH), [module.head.weight])
        assert float(grad.norm()) > 0
    assert torch.equal(module.head.weight.grad, torch.ones_like(module.head.weight))


def test_plain_modules_without_logging() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    before = tensors(module)
    with isolated(module):
        module.train()
        module(torch.randn(4, 3))
        assert not torch.equal(before["0.running_mean"], module[0].running_mean)
    assert all(torch.equal(before[k], v) for k, v in tensors(module).items())


def test_nesting() -> None:
    module = Stateful()
    before = attributes(module)
    with isolated(module):
        module.validation_step(BATCH)
        with isolated(module):
            module.train()
            module.validation_step(BATCH)
        assert module.count == 1 and not module.training
        module.log("still", 1.0)
    assert attributes(module) == before


def test_a_log_of_the_users_own_comes_back_and_stays_muted_when_nested() -> None:
    module, told = nn.Linear(2, 2), []
    module.log_dict = lambda values: None
    module.log = own = lambda name, value: told.append(name)
    with isolated(module):
        module.log("one", 1.0)
        with isolated(module):
            module.log("two", 2.0)
        module.log("three", 3.0)
    assert not told
    assert module.log is own
