"""Contract 1 for each example's model: with the callback and without, training leaves the same behind, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ine_callback import InfluenceCallback, InfluenceReport, Query
from ine_callback.report import RunInfo
from tests.helpers.identical import History, compare, fitted, left_behind

Load = Callable[[str], ModuleType]


@pytest.mark.long
def test_digits(example: Load) -> None:
    digits = example("digits.py")
    train, val, _ = digits.noisy_digits(seed=3)
    results = []
    for queries in (None, ["val", Query.margin("val"), Query.per_class("val"), "self"]):
        callbacks: list[L.Callback] = [History()]
        if queries is not None:
            callbacks.append(InfluenceCallback(queries=queries, on_error="raise", refresh_every=3))
        trainer, _ = digits.fit(train, val, callbacks, epochs=2, seed=5)
        results.append((fitted(trainer, callbacks[0]), digits.state(trainer)))
    (plain, plain_vector), (recorded, recorded_vector) = results
    compare(plain, recorded)
    assert torch.equal(plain_vector, recorded_vector)
    buffers = [name for name, _ in trainer.lightning_module.named_buffers()]
    assert any("running_mean" in name for name in buffers)  # else the test says nothing about BatchNorm


def test_digits_state_sees_a_single_changed_bit(example: Load) -> None:
    digits = example("digits.py")
    train, val, _ = digits.noisy_digits(seed=3)
    trainer, _ = digits.fit(train, val, [], epochs=1, seed=5)
    before = digits.state(trainer)
    weight = next(trainer.lightning_module.parameters())
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf))
    assert not torch.equal(before, digits.state(trainer))


@pytest.mark.long
def test_char_lm(example: Load) -> None:
    lm = example("char_lm.py")
    text = (lm.Path(lm.__file__).parent / "excerpt.txt").read_text(encoding="utf-8")[:4000]
    alphabet = "".join(sorted(set(text)))
    rows, held_out = lm.rows_of(lm.documents(text))
    train = lm.encode([piece for _, piece in rows], alphabet)
    results = []
    for queries in (None, {title: lm.encode(pieces, alphabet) for title, pieces in held_out.items()} | {"own": "self"}):
        callbacks: list[L.Callback] = [History()]
        if queries is not None:
            callbacks.append(InfluenceCallback(queries=queries, on_error="raise", refresh_every=2))
        trainer, _ = lm.fit(train, len(alphabet), callbacks, epochs=3, seed=1)
        results.append(fitted(trainer, callbacks[0]))
    compare(*results)


def test_cli_model(example: Load) -> None:
    cli = example("cli/main.py")
    data = cli.DigitsData()
    data.setup("fit")
    results = []
    for queries in (None, ["self", "val", Query.margin("val")]):
        L.seed_everything(7, verbose=False)
        history, model = History(), cli.SmallCNN(width=8, dropout=0.3)
        model.configure_optimizers = lambda model=model: torch.optim.Adam(model.parameters(), 1e-2)
        callbacks: list[L.Callback] = [history]
        if queries is not None:
            callbacks.append(InfluenceCallback(queries=queries, on_error="raise", refresh_every=4))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(model, data)
        results.append(fitted(trainer, history))
    compare(*results)


def test_torch_loop(example: Load) -> None:
    loop = example("torch_loop.py")
    data, val, _ = loop.noisy_digits(0)
    results = []
    for enabled in (False, True):
        torch.manual_seed(11)
        model = loop.make_model()
        optimizer, _ = loop.train(model, data, val, epochs=1, enabled=enabled)
        results.append(left_behind(model, optimizer))
    compare(*results)


class _InOrder:
    """Hands the loop's batches to Lightning, epoch by epoch."""

    def __init__(self, order: list[torch.Tensor], epochs: int) -> None:
        self._order, self._length, self._epoch = order, len(order) // epochs, 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Any:
        self._epoch += 1
        return iter([rows.tolist() for rows in self._order[(self._epoch - 1) * self._length :][: self._length]])


def _under_lightning(loop: ModuleType, data: Any, val: Any, epochs: int) -> tuple[torch.nn.Module, InfluenceReport]:
    class Wrapped(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = loop.make_model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return loop.loss_of(self, batch)

        def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return loop.loss_of(self, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return loop.make_optimizer(self)

    callback = InfluenceCallback(queries=["val", Query.margin("val"), "self"], on_error="raise")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[callback], accelerator="cpu", enable_model_summary=False, **quiet)
    torch.manual_seed(2)
    model = Wrapped()
    train = DataLoader(torch.utils.data.TensorDataset(*data), batch_sampler=_InOrder(loop.batches(epochs, 0), epochs))
    trainer.fit(model, train, DataLoader(torch.utils.data.TensorDataset(*val), batch_size=100))
    assert callback.report is not None
    return model.net, callback.report


@pytest.mark.long
def test_the_bare_loop_and_lightning_give_the_same_scores(example: Load) -> None:
    loop = example("torch_loop.py")
    data, val, _ = loop.noisy_digits(0)
    torch.manual_seed(2)
    model = loop.make_model()
    _, bare = loop.train(model, data, val, epochs=2)
    net, wired = _under_lightning(loop, data, val, epochs=2)
    for a, b in zip(model.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert bare.queries == wired.queries
    for name in ("mu", "se", "p", "q", "t", "p_t", "null_sd", "mean_loss", "observations", "null_mu", "null_ks_p"):
        one, other = getattr(bare.scores, name), getattr(wired.scores, name)
        if name in ("mu", "se"):  # the closing pass draws labels for rows in another order
            shared = np.array([query.kind == "self" for query in bare.scores.queries])
            for a, b in zip(one.T[~shared], other.T[~shared], strict=True):
                assert np.corrcoef(a, b)[0, 1] > 0.95
            one, other = one[:, shared], other[:, shared]
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6 * np.nanmax(np.abs(one))), name
    assert isinstance(bare.run, RunInfo) and bare.run.steps == wired.run.steps == 90
