"""Embeddings with sparse gradients, bags and norms: chains see plain functions of the weights."""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import BIF, FINE, InfluenceCallback, bif_scores
from ine_callback.methods.bif import evaluation
from ine_callback.methods.bif.dense_embeddings import DenseEmbeddings

IDS, Y = torch.randint(9, (24, 5), generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


class Table(nn.Module):
    """A table looked up through the function, not the module."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table, self.sparse = nn.Parameter(torch.randn(9, 4)), sparse

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table, sparse=self.sparse).mean(1)


class Mean(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, **options)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids).mean(1)
        return out


class Weighted(nn.EmbeddingBag):
    """Factorization machines weigh what they look up."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input, per_sample_weights=(input.to(self.weight.dtype) + 1) / 9)


class Model(L.LightningModule):
    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed, self.out = embed, nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.out(self.embed(batch[0])), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


KINDS: dict[str, Any] = {
    "embedding": lambda sparse: Mean(sparse=sparse),
    "padded": lambda sparse: Mean(padding_idx=2, sparse=sparse),
    "function": Table,
    "bag of means": lambda sparse: nn.EmbeddingBag(9, 4, sparse=sparse),
    "bag of sums": lambda sparse: nn.EmbeddingBag(9, 4, mode="sum", padding_idx=0, sparse=sparse),
    "weighted bag": lambda sparse: Weighted(9, 4, mode="sum", sparse=sparse),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [False, True])
def test_sparse_tables_give_the_scores_of_dense_ones(kind: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:  # too large to hold the rows' gradients: forward derivatives instead
        monkeypatch.setattr(evaluation, "MAX_GRADIENT_ENTRIES", 1)

    def scores(sparse: bool) -> Any:
        torch.manual_seed(1)
        model = Model(KINDS[kind](sparse))
        before = [p.detach().clone() for p in model.parameters()]
        found = bif_scores(model, (IDS, Y), {"q": (IDS[:6], Y[:6])}, BIF(draws=8, chains=4), progress=False)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(p.grad is None for p in model.parameters())
        assert not [note for note in found.notes if "one by one" in note]
        return found.scores

    assert np.array_equal(scores(True), scores(False)) and np.isfinite(scores(True)).all()


@pytest.mark.parametrize("kind", ["embedding", "bag of means", "function"])
def test_a_fit_with_sparse_tables(kind: str) -> None:
    def fit(*methods: Any) -> tuple[Model, Any]:
        L.seed_everything(1, verbose=False)
        model, callbacks = Model(KINDS[kind](True)), []
        if methods:
            callbacks.append(InfluenceCallback(methods=list(methods), on_error="raise", uncaptured="fallback"))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)
        data = TensorDataset(IDS, Y)
        trainer.fit(model, DataLoader(data, batch_size=6, shuffle=True), DataLoader(data, batch_size=8))
        return model, callbacks

    plain, _ = fit()
    model, (influence,) = fit(FINE(), BIF(draws=16, chains=4))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert influence.report.bif is not None and np.isfinite(influence.report.bif.scores).all()


def test_rows_longer_than_max_norm_are_not_rewritten() -> None:
    torch.manual_seed(1)
    model = Model(Mean(max_norm=0.5, sparse=True))
    before = model.embed.table.weight.detach().clone()  # type: ignore[operator]
    found = bif_scores(model, (IDS, Y), {"q": (IDS[:6], Y[:6])}, BIF(draws=24), progress=False)
    assert np.isfinite(found.scores).all() and torch.equal(model.embed.table.weight, before)
    assert not [note for note in found.notes if "one by one" in note]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(("padding", "flat", "ends", "short"), itertools.product((None, 3, -1), *[(False, True)] * 3))
def test_bags_are_torchs(mode: Any, padding: int | None, flat: bool, ends: bool, short: bool) -> None:
    if ends and not flat:
        return
    g = torch.Generator().manual_seed(0)
    table = torch.randn(9, 4, generator=g, dtype=torch.float64)
    ids = torch.randint(9, (14,), generator=g) if flat else IDS
    offsets = torch.tensor([0, 3, 3, 9, 10, *([14] if ends else [])]) if flat else None  # the second bag is empty

    def bag(weight: Tensor) -> Tensor:
        norm = 1.0 if short else None
        options = {"mode": mode, "padding_idx": padding, "include_last_offset": ends, "max_norm": norm}
        return F.embedding_bag(ids, weight, offsets, **options)

    expected = bag(table.clone().requires_grad_(not short))
    with DenseEmbeddings():
        leaf = table.clone().requires_grad_()
        found = bag(leaf)
        assert torch.allclose(vmap(bag)(torch.stack([table, 2 * table]))[0], expected)
        assert jvp(bag, (table,), (table,))[1].shape == expected.shape
    assert torch.allclose(found, expected)
    if short:
        return
    ahead = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    (slope,) = torch.autograd.grad((found * ahead).sum(), leaf)
    again = table.clone().requires_grad_()
    assert torch.allclose(slope, torch.autograd.grad((bag(again) * ahead).sum(), again)[0])
