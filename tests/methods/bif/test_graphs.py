"""Batches that cannot be cut into rows: graphs, bags with offsets, lists. One pass of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ine_callback import BIF, CallableQuery, EachRow, bif_scores, run_bif
from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.flat_module import FlatModule
from ine_callback.methods.bif.posterior import LocalPosterior
from ine_callback.methods.bif.row_losses import row_losses
from ine_callback.utilities.isolation import isolated

GRAPHS = 12
G = torch.Generator().manual_seed(0)
DATA = [(torch.randn(2 + k % 4, 6, generator=G, dtype=torch.float64), k % 3) for k in range(GRAPHS)]
SHORT_CHAINS = BIF(draws=16, chains=4)


@dataclass
class Graphs:
    """Nodes of all graphs, the graph that each belongs to, a label of each graph."""

    x: Tensor
    batch: Tensor
    y: Tensor


class Data:
    """Like torch_geometric's: an object of no known kind, with ``to``."""

    def __init__(self, x: Tensor, batch: Tensor, y: Tensor) -> None:
        self.x, self.batch, self.y = x, batch, y

    def to(self, *args: Any, **kwargs: Any) -> Data:
        return Data(*(part.to(*args, **kwargs) for part in (self.x, self.batch, self.y)))


def collate(kind: Any, items: Any) -> Any:
    nodes = torch.tensor([len(x) for x, _ in items])
    x, y = torch.cat([x for x, _ in items]), torch.tensor([y for _, y in items])
    return kind(x, torch.arange(len(items)).repeat_interleave(nodes), y)


def dictionary(x: Tensor, batch: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"x": x, "batch": batch, "y": y}


KINDS = [Graphs, Data, dictionary, lambda *parts: parts]


class GNN(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.h = nn.Linear(6, 5), nn.Linear(5, 3)
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            batch = tuple(batch.values())
        x, graph, y = batch if isinstance(batch, tuple) else (batch.x, batch.batch, batch.y)
        nodes = self.a(x).tanh()
        return F.cross_entropy(self.h(nodes.new_zeros(len(y), 5).index_add(0, graph, nodes)), y)

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_are_read_from_one_pass(kind: Any) -> None:
    model, batch = GNN(), collate(kind, DATA)
    alone = torch.stack([model.training_step(collate(kind, [item]), 0) for item in DATA])
    gradient = torch.autograd.grad(alone.mean(), list(model.parameters()), retain_graph=True)
    with isolated(model):
        losses = row_losses(model, batch, count=GRAPHS)
        rows = losses.rows(model, batch)
        assert len(rows) == GRAPHS and torch.allclose(losses(model, rows), alone, rtol=1e-12)
        assert torch.allclose(losses(model, rows.take(torch.tensor([7, 2]))), alone[[7, 2]], rtol=1e-12)
        posterior = LocalPosterior(FlatModule(model), losses, rows, BIF(batch_size=4, n_beta=30.0))
        here = posterior.gradient(torch.zeros(1, len(posterior.weights), dtype=torch.float64))[0]
        assert torch.allclose(here, torch.cat([g.flatten() for g in gradient]), rtol=0, atol=1e-12)
        far = torch.ones(1, len(posterior.weights), dtype=torch.float64)  # all rows a step: no noise of minibatches
        assert torch.equal(posterior.gradient(far), posterior.gradient(far)) and posterior.whole
    found = bif_scores(
        model,
        batch,
        {"q": collate(kind, DATA[:5]), "r": EachRow(collate(kind, DATA[:2]))},
        SHORT_CHAINS,
        progress=False,
    )
    assert found.scores.shape == (GRAPHS, 3) and np.isfinite(found.scores).all()
    assert any("cannot be cut out of their batch" in note for note in found.notes)


def test_scores_are_those_of_graphs_that_can_be_cut() -> None:
    """Graphs of as many nodes each, once concatenated and once as a tensor [graphs, nodes, 6]."""

    class Dense(GNN):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.h(self.a(batch[0]).tanh().sum(1)), batch[1])

    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(GRAPHS, 4, 6, generator=g, dtype=torch.float64), torch.arange(GRAPHS) % 3
    items = list(zip(x, y.tolist(), strict=True))
    bif = BIF(draws=16, chains=4, batch_size=GRAPHS, rows=[1, 8, 3])
    whole = bif_scores(GNN(), collate(Data, items), {"q": collate(Data, items[:4])}, bif, progress=False)
    cut = bif_scores(Dense(), (x, y), {"q": (x[:4], y[:4])}, bif, progress=False)
    assert np.allclose(whole.scores, cut.scores, rtol=1e-6) and whole.rows.tolist() == [1, 8, 3]


@pytest.mark.parametrize("offered", ["influence_loss", "loss_fn"])
def test_lists_of_images_by_a_function_of_the_users(offered: str) -> None:
    class Detector(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.c, self.h = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)

    def losses(model: Any, batch: Any) -> Tensor:
        images, targets = batch
        out = torch.stack([model.h(model.c(image[None]).relu().mean((2, 3)))[0] for image in images])
        return torch.stack([(out[k] - target["boxes"]).abs().mean() for k, target in enumerate(targets)])

    images = [torch.randn(1, 5 + k % 2, 5) for k in range(8)]
    targets = [{"boxes": torch.rand(1 + k % 3, 4), "name": f"im{k}"} for k in range(8)]
    model = Detector()
    if offered == "influence_loss":
        model.influence_loss = lambda batch: losses(model, batch)  # type: ignore[assignment]
    function = losses if offered == "loss_fn" else None
    query = CallableQuery(lambda module, batch: losses(module, batch).mean(), (images[:3], targets[:3]))
    found = bif_scores(model, (images, targets), {"q": query}, SHORT_CHAINS, function, progress=False)
    assert found.scores.shape == (8, 1) and np.isfinite(found.scores).all()
    with pytest.raises(InfluenceError, match=r"returned \(8,\) for a batch of 9 rows"):
        bif_scores(model, (images, targets), {"q": query}, SHORT_CHAINS, function, progress=False, count=9)


def test_bags_with_offsets() -> None:
    class Bags(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.e, self.h = nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.h(self.e(batch[0], batch[1])), batch[2])

    ids, offsets, y = torch.arange(30) % 9, torch.tensor([0, 4, 6, 11, 13, 20, 25, 28]), torch.arange(8) % 3
    model = Bags()
    found = bif_scores(model, (ids, offsets, y), {"q": (ids[:6], offsets[:2], y[:2])}, SHORT_CHAINS, progress=False)
    assert found.scores.shape == (8, 1) and np.isfinite(found.scores).all()
    assert found.loss.shape == (4, 16)


class Counted(Data):
    """torch_geometric's batches know how many graphs they hold."""

    @property
    def num_graphs(self) -> int:
        return len(self.y)

    def to(self, *args: Any, **kwargs: Any) -> Counted:
        return Counted(*vars(super().to(*args, **kwargs)).values())


@pytest.mark.parametrize("kind", [Counted, Graphs])
def test_a_validation_loader_of_graphs(kind: Any) -> None:
    """Its batches have more nodes than a piece may have rows, and must not be cut all the same."""
    data = [(torch.randn(60, 6, generator=G, dtype=torch.float64), k % 3) for k in range(8)]
    loader = DataLoader(data, batch_size=4, collate_fn=lambda items: collate(kind, items))  # type: ignore[arg-type]
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", precision="64-true")
    found = run_bif(trainer, GNN(), SHORT_CHAINS, "val", train_dataloaders=loader, val_dataloaders=loader)
    direct = bif_scores(GNN(), collate(kind, data), {"val": collate(kind, data)}, SHORT_CHAINS, progress=False, count=8)
    assert np.allclose(found.scores, direct.scores, rtol=1e-9)


@pytest.mark.parametrize("kind", [Graphs, lambda *parts: parts])
def test_rows_are_dataset_indices_in_run_bif(kind: Any) -> None:
    model = GNN()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loader = DataLoader(DATA, batch_size=4, collate_fn=lambda items: collate(kind, items))  # type: ignore[arg-type]
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", precision="64-true")
    query = CallableQuery(lambda module, batch: module.training_step(batch, 0), collate(kind, DATA[:4]), "q")
    found = run_bif(trainer, model, BIF(draws=16, chains=4, rows=[5, 2]), query, train_dataloaders=loader)
    assert found.rows.tolist() == [5, 2] and np.isfinite(found.scores).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_labels_of_nodes_are_refused_before_the_chains() -> None:
    class Nodes(GNN):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.h(self.a(batch.x).tanh()), batch.batch % 3)

        validation_step = training_step

    with pytest.raises(InfluenceError, match=r"has 42 terms for 12 rows.*loss_fn="):
        bif_scores(Nodes(), collate(Data, DATA), {"q": collate(Data, DATA)}, SHORT_CHAINS, progress=False, count=GRAPHS)
