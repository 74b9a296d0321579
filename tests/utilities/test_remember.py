"""Whatever a module holds, and wherever the preparation fails: nothing is left changed."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection, MetricTracker, MinMaxMetric, SumMetric
from torchmetrics.aggregation import CatMetric, RunningMean
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper

from ine_callback import InfluenceCallback
from ine_callback.utilities.isolation import isolated, unmoved
from tests.helpers.meter import Meter

Hidden = namedtuple("Hidden", "h c")


class Slotted:
    __slots__ = ("cache", "count")

    def __init__(self) -> None:
        self.count = 0


class Hostile:
    """Raises at whatever is done to it."""

    def __getattribute__(self, name: str) -> Any:
        raise ValueError(name)

    def __eq__(self, other: object) -> bool:
        raise ValueError("eq")

    __hash__ = object.__hash__
    __copy__ = __deepcopy__ = __getstate__ = __reduce_ex__ = None  # type: ignore[assignment]


class Stubborn(dict):  # type: ignore[type-arg]
    """A dictionary that cannot be read or copied by its own methods."""

    def items(self) -> Any:
        raise ValueError("items")

    __iter__ = copy = keys = values = __copy__ = __eq__ = items  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def live(module: nn.Module) -> Tensor:
    return sum(p.sum() for p in module.parameters()) * torch.ones(2)


class Rich(L.LightningModule):
    """Holds one of each kind, and a step that touches all of them."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), nn.Dropout()
        self.loss = MeanMetric()  # updated with what requires gradients
        self.many = MetricCollection({"a": MulticlassAccuracy(2), "f": MulticlassF1Score(2)}, compute_groups=True)
        self.by_name = nn.ModuleDict({"max": MaxMetric(), "range": MinMaxMetric(MeanMetric())})
        self.by_place = nn.ModuleList([CatMetric(), RunningMean(window=2)])
        self.tracker, self.boot = MetricTracker(MeanMetric(), maximize=False), BootStrapper(MeanMetric(), 2)
        self.classes, self.plain = ClasswiseWrapper(MulticlassAccuracy(2, average=None)), [SumMetric(), MeanMetric()]
        self.tracker.increment()
        self.average = AveragedModel(self.net)
        self.hidden, self.cached = Hidden(live(self.net), live(self.net)), {"loss": live(self.net)}
        self.history: list[Tensor] = [live(self.net)]
        self.register_buffer("centre", live(self.net) / 2)
        self.register_buffer("wide", torch.zeros(1, 2).expand(3, 2))
        self.register_buffer("edges", torch.eye(3).to_sparse())
        self.alias, self.view = self.wide, torch.zeros(4)[1:3]
        self.meter, self.slotted = Meter(), Slotted()
        self.__dict__.update(hostile=Hostile(), gone=weakref.proxy(Meter()))  # setting them asks what they are
        self.stubborn, self.shown = Stubborn(a=1), types.MappingProxyType({"a": [1]})
        self.order, self.counts, self.lists = OrderedDict(a=1, b=2), Counter("aab"), defaultdict(list, a=[1])
        self.fixed = np.zeros(3)
        self.fixed.flags.writeable = False
        self.lock, self.code, self.ref = threading.Lock(), lambda: None, weakref.ref(self.meter)
        self.file = open(__file__)  # noqa: SIM115
        self.stream, self.numbers = (k for k in range(9)), itertools.count()
        self.system, self.dice = random.SystemRandom(), random.Random(0)
        self.teacher = [nn.BatchNorm1d(3)]
        for p in self.parameters():
            p.grad = torch.ones_like(p)

    @property
    def lazy(self) -> Any:
        raise ValueError("not yet")

    def touch(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        for metric in (self.loss, *self.by_name.values(), *self.by_place, self.tracker, *self.plain):
            metric.update(loss)
            metric(loss)
        self.boot.update(loss.expand(3))
        self.many.update(logits, y)
        self.many.compute()
        self.many["a"].reset()
        self.classes.update(logits, y)
        self.tracker.increment()
        self.log("loss", self.loss)
        self.average.update_parameters(self.net)
        with torch.no_grad():
            self.net[0].weight.copy_(F.normalize(self.net[0].weight))
            self.hidden.h.mul_(2)
            self.cached["loss"].zero_()
        self.history[0].detach_()
        self.history.append(loss)
        self.hidden, self.cached["new"] = Hidden(loss, loss), loss
        self.centre.add_(loss)
        self.view += loss
        self.edges.mul_(2)
        self.meter.update(1.0)
        self.slotted.count, self.slotted.cache = 1, loss
        type(self).count += 1
        dict.update(self.stubborn, a=2)
        self.shown["a"].append(2)
        self.order.move_to_end("a")
        self.counts.update("abc")
        self.lists["b"].append(2)
        self.dice.random()
        self.teacher[0](x)
        self.extra = nn.Linear(2, 2)
        self.net[0].bias.requires_grad_(False)
        self.net[2].zero_grad()
        loss.backward(inputs=[self.net[0].weight])
        torch.rand(1)
        return loss


X, Y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
_READ = (nn.Module, Metric, Meter, Stubborn)


def picture(root: nn.Module) -> dict[str, Any]:
    """Everything that can be seen: identities, contents, versions, graphs."""
    seen: dict[str, Any] = {"rng": (torch.get_rng_state().tolist(), random.getstate()[1][:5])}
    waiting, met = [("", root)], set()
    while waiting:
        path, value = waiting.pop()
        if id(value) in met:
            continue
        met.add(id(value))
        kind = type(value)
        parts: dict[Any, Any] = {}
        if issubclass(kind, Tensor):
            dense = value.to_dense() if value.is_sparse else value
            graph = (value.grad_fn, value.requires_grad, value._version)  # the node, held: ids are reused
            seen[path] = (graph, dense.detach().tolist(), id(value.grad) if value.is_leaf else None)
        elif issubclass(kind, dict):
            parts = dict(OrderedDict.items(value) if issubclass(kind, OrderedDict) else dict.items(value))
        elif issubclass(kind, list | tuple):
            parts = dict(enumerate(value))
        elif kind is Slotted:
            parts = {name: getattr(value, name, "unset") for name in kind.__slots__}
        elif issubclass(kind, random.Random) and kind is random.Random:
            seen[path] = value.getstate()[2:] + value.getstate()[1][-1:]
        elif issubclass(kind, _READ):
            parts = dict(vars(value))
        if parts:
            seen[path] = [(name, id(part)) for name, part in parts.items()]
            waiting += [(f"{path}.{name}", part) for name, part in parts.items()]
    seen["class"] = (Rich.count, list(Meter.total))
    return seen


def prepared() -> Rich:
    module = Rich()
    module.loss.update(live(module.net))
    module.many.update(torch.eye(2), torch.tensor([0, 1]))
    with torch.inference_mode():
        module.plain[1].update(torch.ones(1))
    return module.train()


def test_a_step_that_touches_all_leaves_no_trace() -> None:
    module = prepared()
    before = picture(module)
    with isolated(module):
        module.touch(X, Y)
    after = picture(module)
    assert after == before, {k: (before.get(k), after.get(k)) for k in before | after if before.get(k) != after.get(k)}
    assert next(module.stream) == 0 and next(module.numbers) == 0
    assert not module.file.closed and module.net.training and "log" not in vars(module)
    module.cached["loss"].sum().backward()  # the live graph is whole
    module.hidden.c.sum().backward()


def test_metrics_go_on_as_if_nothing_had_been() -> None:
    module, plain = prepared(), prepared()
    with isolated(module):
        module.touch(X, Y)
    for each in (module, plain):
        each.many.update(torch.eye(2), torch.tensor([1, 1]))
    a, f = module.many._modules["a"], module.many._modules["f"]
    assert a.tp is f.tp  # a group of metrics still shares its states
    assert module.many.compute() == plain.many.compute()


def side(module: Rich, fail: bool) -> None:
    with isolated(module):
        module.touch(X, Y)
        module.table.flags.writeable = False  # cannot be put back
        if fail:
            raise ZeroDivisionError


def test_restoring_goes_on_past_what_cannot_be_restored() -> None:
    module = prepared()
    module.table = np.zeros(2)
    before = picture(module)
    with pytest.raises(ValueError, match="read-only"):
        side(module, fail=False)
    assert picture(module) == before


def test_the_first_error_is_the_bodys() -> None:
    module = prepared()
    module.table = np.zeros(2)
    before = picture(module)
    with pytest.raises(ZeroDivisionError):
        side(module, fail=True)
    assert picture(module) == before


FILES = ("isolation.py", "remember.py", "restores.py", "held.py", "reached.py")


def points(module: nn.Module, k: int | None = None) -> int:
    """How often functions of the isolation are called while it prepares; the ``k``-th call raises."""
    count = 0

    def trace(frame: types.FrameType, event: str, arg: object) -> None:
        nonlocal count
        code = frame.f_code
        if Path(code.co_filename).name in FILES and code.co_name[0] != "<":
            count += 1
            if count == k:
                raise MemoryError(f"point {k}")

    sys.settrace(trace)
    try:
        with isolated(module):
            sys.settrace(None)
    finally:
        sys.settrace(None)
    return count


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss, self.kept = nn.BatchNorm1d(2), MeanMetric(), {"a": [1]}
        self.loss.update(live(self.net))


@pytest.mark.parametrize(("make", "stride"), [(Small, 7), (prepared, 397)], ids=["small", "rich"])
def test_a_failure_at_any_point_of_the_preparation(make: Callable[[], nn.Module], stride: int) -> None:
    module = make()
    points(module)  # fills the caches
    before, many = picture(module), points(module)
    assert many > 200
    for k in sorted({*range(1, many, stride), *range(many - 20, many)}):
        with pytest.raises((MemoryError, RuntimeError), match=f"point {k}"):
            points(module, k)
        assert picture(module) == before, k
        assert "log" not in vars(module)


def test_iterators_are_not_spent() -> None:
    module = nn.Module()
    module.stream = iter(DataLoader(TensorDataset(X), batch_size=2))
    module.pairs = (zip([1, 2], [3, 4], strict=True), 0)
    with isolated(module):
        with pytest.raises(RuntimeError, match="callable query"):
            next(module.stream)
        with pytest.raises(RuntimeError, match="zip"):
            next(module.pairs[0])
    assert len(next(module.stream)[0]) == 2 and next(module.pairs[0]) == (1, 3)


def test_what_the_trainer_owns_is_left_alone() -> None:
    class Owner(L.LightningModule):
        pass

    module, trainer = Owner(), L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    module.trainer, callback = trainer, InfluenceCallback()
    module.kept = [callback, trainer.state, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)]
    with isolated(module):
        callback.steps = 3  # type: ignore[attr-defined]
        module.kept[2].param_groups[0]["lr"] = 0.5
    assert callback.steps == 3  # type: ignore[attr-defined]
    assert module.kept[2].param_groups[0]["lr"] == 1.0  # a scheduler that a step moves changes it


def test_frozen_backbones_are_not_copied_but_watched() -> None:
    module = nn.ModuleDict({"backbone": nn.Linear(50, 50).requires_grad_(False), "head": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match="frozen parameter"), isolated(module), torch.no_grad():
        module["backbone"].weight.add_(1)
    with isolated(module):
        pass


def test_contents_saved_by_a_live_graph_stay_usable() -> None:
    module = nn.Module()
    module.register_buffer("scale", torch.ones(2))
    x = torch.ones(2, requires_grad=True)
    loss = (x * module.scale).sum()
    with isolated(module):
        module.scale.mul_(3)
    loss.backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0]


def test_unmoved_bears_hostile_data_sets() -> None:
    class Rows:
        def __init__(self) -> None:
            self.hostile, self.dice = Hostile(), random.Random(1)

        def __getattr__(self, name: str) -> Any:
            raise ValueError(name)

    rows = Rows()
    before = rows.dice.getstate(), torch.get_rng_state().tolist()
    with unmoved(rows):
        rows.dice.random(), torch.rand(1)
    assert (rows.dice.getstate(), torch.get_rng_state().tolist()) == before
