"""EK-FAC against kronfluence: scores of each layer by the rows' own labels, from the same weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import IF
from ine_callback.methods import FitContext, FitEndMethods
from ine_callback.queries import CallableQuery
from ine_callback.queries.sources import DataSource
from tests.helpers.contexts import entropy
from tests.methods.influence.conftest import relative

pytest.importorskip("kronfluence")

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task

ROWS, QUERIES, WIDTH, CLASSES = 96, 5, 9, 4


class Classes(Task):
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A float32 network, its rows and its queries."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS + QUERIES, WIDTH, generator=generator)
    y = x[:, :CLASSES].argmax(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:ROWS]), y[:ROWS]).backward()
        optimizer.step()
    return model, TensorDataset(x[:ROWS], y[:ROWS]), TensorDataset(x[ROWS:], y[ROWS:])


@pytest.fixture(scope="module")
def analyzer(trained: tuple[nn.Module, TensorDataset, TensorDataset], tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, rows, _ = trained
    task, folder = Classes(), tmp_path_factory.mktemp("kronfluence")
    made = Analyzer("network", prepare_model(copy.deepcopy(model), task), task, True, output_dir=str(folder))
    made.fit_all_factors("factors", rows, 32, factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True))
    return made


@pytest.mark.parametrize(("damping", "theirs"), [(1e-3, 1e-3), ("auto", None)])
def test_scores_of_each_layer_are_kronfluences_over_the_number_of_rows(
    trained: tuple[nn.Module, TensorDataset, TensorDataset], analyzer: Any, damping: Any, theirs: float | None
) -> None:
    model, rows, queries = trained
    name = f"scores {damping}"
    arguments = ScoreArguments(damping_factor=theirs, compute_per_module_scores=True)
    analyzer.compute_pairwise_scores(name, "factors", queries, rows, QUERIES, 32, score_args=arguments)
    wanted = {module: found.double().numpy().T for module, found in analyzer.load_pairwise_scores(name).items()}

    # ours in float64 from the same weights: what differs is kronfluence's float32
    double = copy.deepcopy(model).double()
    (x, y), (xq, yq) = rows.tensors, queries.tensors
    source = DataSource("Test", entropy, DataLoader(TensorDataset(x.double(), y), 16), [], 10**6)
    asked = {str(k): CallableQuery(entropy, (xq[k : k + 1].double(), yq[k : k + 1])) for k in range(QUERIES)}
    bound = [one for key, query in asked.items() for one in query.bind(key, source)]
    methods = FitEndMethods([IF(fisher="empirical", damping=damping, per_layer=True)], "Test", "raise")
    methods.run(FitContext(double, bound, source, entropy, owner="Test"))
    layers = methods.found[0].layers
    assert layers is not None and layers.names == ("0.weight", "2.weight") and sorted(wanted) == ["0", "2"]
    for k, layer in enumerate(layers.names):
        module = layer.partition(".")[0]
        found, theirs_of_layer = ROWS * layers.scores[:, k], wanted[module]
        assert found.shape == theirs_of_layer.shape == (ROWS, QUERIES)
        assert relative(found, theirs_of_layer) < 1e-5
        assert np.abs(theirs_of_layer).max() > 1e-2
