"""What the tables share: digits, networks, and IF on a module that no Trainer trained."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.data import digits
from benchmarks.metrics import Floats
from ine_callback import IF
from ine_callback.methods.context import FitContext
from ine_callback.methods.fit_end import FitEndMethod, FitEndMethods, Take
from ine_callback.methods.influence.curvature import Curvature
from ine_callback.methods.influence.solvers.base import System
from ine_callback.methods.passes import PerSamplePass
from ine_callback.optimizers.registry import summed_rates
from ine_callback.queries import Query
from ine_callback.queries.sources import DataSource
from ine_callback.scores import Attribution

PIXELS, CLASSES = 64, 10
T = TypeVar("T")
Loss = Callable[[nn.Module, Any], Tensor]


def shuffled_digits(seed: int) -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits in another order for each seed, in float64."""
    x, y = digits(None)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return x[order].double(), y[order]


def network(hidden: int, seed: int, scale: tuple[float, float]) -> nn.Sequential:
    """Two layers with normal weights and biases of these standard deviations."""
    model = nn.Sequential(nn.Linear(PIXELS, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, spread in zip(model.parameters(), (scale[0],) * 2 + (scale[1],) * 2, strict=True):
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def context_of(
    module: nn.Module,
    loss: Loss,
    data: tuple[Tensor, Tensor],
    queries: dict[str, Query],
    run: tuple[Optimizer, float] | None = None,
) -> FitContext:
    """The trained module as a method gets it at the end of a fit; ``run``: its optimizer and summed learning rates."""
    source = DataSource("benchmarks.influence", loss, DataLoader(TensorDataset(*data), len(data[1])), [], 10**6)
    bound = [one for name, query in queries.items() for one in query.bind(name, source)]
    rates = None if run is None else partial(summed_rates, *run)
    return FitContext(module, bound, source, loss, owner="benchmarks.influence", summed_rates=rates)


def scored(context: FitContext, method: FitEndMethod) -> Attribution:
    """What a method finds."""
    methods = FitEndMethods([method], "benchmarks.influence", on_error="raise")
    methods.run(context)
    return methods.found[0]


def driven(context: FitContext, steps: Generator[tuple[PerSamplePass, Take], None, T]) -> T:
    """Makes the passes that a method asks for; returns what it returns."""
    while True:
        try:
            asked, take = next(steps)
        except StopIteration as done:
            found: T = done.value
            return found
        for rows, gradients in context.per_sample(asked):
            take(rows, gradients)


def system_of(context: FitContext, method: IF) -> System:
    """The linear system that IF solves, with the exact Fisher."""
    curvature = Curvature(context, method, "exact")

    def passes() -> Generator[tuple[PerSamplePass, Take], None, None]:
        yield from curvature.passes()

    driven(context, passes())
    return curvature.system()


def mean_and_error(values: Any) -> tuple[float, float | None]:
    """Mean and its standard error; of one value none."""
    each = np.asarray(values, dtype=np.float64)
    return float(each.mean()), float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else None


def slope(actual: Floats, predicted: Floats) -> float:
    """Of the regression of the prediction on what happened, through the origin: below 1, predictions are too small."""
    return float((actual * predicted).sum() / (actual**2).sum())


def relative_error(actual: Floats, predicted: Floats) -> float:
    return float(np.linalg.norm(predicted - actual) / np.linalg.norm(actual))
