"""The gap between two groups as a query: value, gradient, batches that do not matter, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, Query
from ine_callback.errors import InfluenceError, QueryError
from ine_callback.queries import GapQuery, gradients, parse, values
from ine_callback.queries.sources import LARGEST_BATCH, DataSource
from tests.helpers.bif.training import Model, loaders

G = torch.Generator().manual_seed(0)
X, Y, Z = torch.randn(23, 4, dtype=torch.float64, generator=G), torch.arange(23) % 3, torch.arange(23) % 4 % 3
SEVERAL = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
ONE = nn.Sequential(nn.Linear(4, 1)).double()


def source() -> DataSource:
    return DataSource("Test", lambda module, batch: module(batch[0]).mean())


def measured(module: nn.Module, query: Query) -> tuple[Tensor, Tensor]:
    bound = query.bind("gap", source())
    found = gradients(bound, module, list(module.parameters()), lambda batch: batch)
    return values(bound, module, lambda batch: batch)[0], torch.cat([each.flatten() for each in found])


def expected(module: nn.Module, positive: list[int], groups: tuple[int, int] = (1, 0)) -> tuple[Tensor, Tensor]:
    score = module(X).softmax(1)[:, positive].sum(1) if module is SEVERAL else module(X)[:, 0].sigmoid()
    value = score[groups[0] == Z].mean() - score[groups[1] == Z].mean()
    return value.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])


@pytest.mark.parametrize("size", [23, 5, 1])
@pytest.mark.parametrize("positive", [1, [0, 2]])
def test_it_is_the_gap_of_all_rows_whatever_the_batches(size: int, positive: Any) -> None:
    loader = DataLoader(TensorDataset(X, Y, Z), batch_size=size)
    value, gradient = measured(SEVERAL, Query.gap(2, loader, positive=positive))
    truth = expected(SEVERAL, [positive] if isinstance(positive, int) else positive)
    assert abs(value - truth[0]) < 1e-12 and (gradient - truth[1]).abs().max() < 1e-12


def test_many_rows_are_several_batches() -> None:
    g = torch.Generator().manual_seed(1)
    x, z = (
        torch.randn(2 * LARGEST_BATCH + 9, 4, dtype=torch.float64, generator=g),
        torch.arange(2 * LARGEST_BATCH + 9) % 2,
    )
    query = Query.gap(1, (x, z), positive=0)
    assert len(query.bind("gap", source())[0].batches) == 3
    value, gradient = measured(SEVERAL, query)
    score = SEVERAL(x).softmax(1)[:, 0]
    truth = score[z == 1].mean() - score[z == 0].mean()
    assert abs(value - truth) < 1e-12
    parts = torch.autograd.grad(truth, list(SEVERAL.parameters()))
    assert (gradient - torch.cat([part.flatten() for part in parts])).abs().max() < 1e-12


def test_functions_groups_and_single_outputs() -> None:
    for query in (
        GapQuery(lambda batch: batch[2], (X, Y, Z), groups=(2, 1)),
        GapQuery(2, (X, Y, Z), groups=(2, 1), forward=lambda module, batch: module(batch[0])[:, 0]),
    ):
        value, gradient = measured(ONE, query)
        truth = expected(ONE, [1], (2, 1))
        assert abs(value - truth[0]) < 1e-12 and (gradient - truth[1]).abs().max() < 1e-12
    by_key = GapQuery("z", {"x": X, "z": Z}, forward=lambda module, batch: module(batch["x"]))
    assert abs(measured(ONE, by_key)[0] - expected(ONE, [1])[0]) < 1e-12


def test_it_is_a_query_like_others() -> None:
    assert list(parse([Query.gap(2)], "Test")) == ["gap"]
    assert list(parse({"parity": Query.gap(2)}, "Test")) == ["parity"]
    (bound,) = Query.gap(2, (X, Y, Z)).bind("gap", source())
    assert bound.info.question == "Does training on this row lower the score of group 1 beside 0 on the query's data?"
    assert sum(weight for weight, _ in bound.batches) == pytest.approx(1)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (GapQuery(2, (X, Y, torch.ones(23))), r"has \[23, 0\] rows of the groups \[1, 0\]; its values are \[1.0\]"),
        (GapQuery(5, (X, Y, Z)), "GapQuery: sensitive=5: a batch of type tuple has nothing there"),
        (GapQuery(0, (X, Y, Z)), r"a batch of 23 rows gives a tensor of shape \(23, 4\)"),
        (GapQuery(2, (X, Y, Z), positive=3), r"positive=\[3\] names none of the 3 classes"),
        (GapQuery("z", {"x": X, "z": Z}), "a batch of type dict does not begin with the inputs; pass forward="),
    ],
)
def test_what_is_wrong_is_named(query: Query, message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        measured(SEVERAL, query)


def test_equal_groups_are_refused() -> None:
    with pytest.raises(QueryError, match=r"groups=\[1, 1\] must be two different values"):
        GapQuery(2, groups=(1, 1))


def test_a_fit_scores_it() -> None:
    import lightning as L

    influence = InfluenceCallback({"gap": Query.gap(lambda batch: batch[0][:, 0] > 0)}, on_error="raise")
    torch.manual_seed(0)
    quiet: Any = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    L.Trainer(max_epochs=2, callbacks=[influence], enable_model_summary=False, **quiet).fit(Model(), *loaders())
    assert influence.report is not None and influence.report.scores.mu[:, 0].std() > 0


def test_it_is_built_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--query", type=Query)
    text = "{class_path: ine_callback.GapQuery, init_args: {sensitive: group, positive: [5, 6], groups: [2, 1]}}"
    built = parser.instantiate_classes(parser.parse_args(["--query", text])).query
    assert (built.sensitive, built.positive, built.groups) == ("group", [5, 6], (2, 1))
