"""Rows that count unequally in the training's loss: tokens, masks, class weights. Explicit float64 loops as oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from ine_callback import BIF, FINE, InfluenceCallback, bif_scores
from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.flat_module import FlatModule
from ine_callback.methods.bif.posterior import LocalPosterior
from ine_callback.methods.bif.row_losses import row_losses
from ine_callback.utilities.isolation import isolated

ROWS, TIME, WORDS, EMPTY = 10, 6, 5, 3
CLASSES = torch.tensor([0.3, 1.0, 2.5, 0.7, 1.9], dtype=torch.float64)
Loss = Callable[[Tensor, Tensor], Tensor]


class Words(L.LightningModule):
    """A tiny causal model: logits [b, T, V] of ids, targets with -100 where a row has ended; row 3 has none at all."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.loss = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS), loss
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self.out(self.embed(batch["ids"]).tanh()), batch["labels"])


def ragged() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(WORDS, (ROWS, TIME), generator=g)
    length = torch.tensor([6, 2, 5, 0, 1, 4, 6, 3, 3, 2])
    labels[torch.arange(TIME) >= length[:, None]] = -100
    return {"ids": torch.randint(WORDS, (ROWS, TIME), generator=g), "labels": labels}


def flat_ce(z: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(z.reshape(-1, WORDS), y.reshape(-1), **kwargs)


def masked(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of all positions and which of them count, as with an attention mask."""
    mask = (y != -100).to(z.dtype)
    return F.cross_entropy(z.transpose(1, 2), y.clamp_min(0), reduction="none"), mask


def ratio(losses: Tensor, mask: Tensor) -> Tensor:
    return (losses * mask).sum() / mask.sum()


def shifted(z: Tensor, y: Tensor) -> Tensor:
    """As in decoders of Hugging Face: labels are shifted inside, and padded with one more that is ignored."""
    return flat_ce(z, F.pad(y, (0, 1), value=-100)[:, 1:].contiguous())


LOSSES: dict[str, Loss] = {
    "ignored targets": flat_ce,
    "ignored targets, classes second": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "shifted labels": shifted,
    "logits cut": lambda z, y: flat_ce(z[:, :-1], y[:, 1:]),
    "another ignored index": lambda z, y: flat_ce(z, y.masked_fill(y < 0, 7), ignore_index=7),
    "a mask after the loss": lambda z, y: ratio(*masked(z, y)),
    "a mask of booleans": lambda z, y: (lambda each, m: each[m.bool()].mean())(*masked(z, y)),
    "a mean of each row": lambda z, y: (lambda each, m: ((each * m).sum(1) / m.sum(1).clamp_min(1)).mean())(
        *masked(z, y)
    ),
    "a sum of each row": lambda z, y: (lambda each, m: (each * m).sum(1).mean())(*masked(z, y)),
    "zeros are averaged too": lambda z, y: flat_ce(z, y, reduction="none").mean(),
    "tokens picked before the loss": lambda z, y: F.cross_entropy(z[y != -100], y[y != -100]),
    "tokens picked from a flat list": lambda z, y: (lambda k: F.cross_entropy(z.flatten(0, 1)[k], y.flatten()[k]))(
        y.flatten() != -100
    ),
    "label smoothing": lambda z, y: flat_ce(z, y, label_smoothing=0.2),
    "class weights": lambda z, y: flat_ce(z, y, weight=CLASSES),
    "class weights and smoothing": lambda z, y: flat_ce(z, y, weight=CLASSES, label_smoothing=0.2),
    "negative log-likelihood": lambda z, y: F.nll_loss(z.log_softmax(2).transpose(1, 2), y, CLASSES),
    "time first": lambda z, y: flat_ce(z.transpose(0, 1), y.T),
    "a sum over the tokens": lambda z, y: flat_ce(z, y, reduction="sum") / (y != -100).sum(),
    "half of it": lambda z, y: 0.5 * flat_ce(z, y),
    "a weighted square": lambda z, y: F.mse_loss(z[..., 0], y.double(), weight=(y != -100).double()),
    "binary targets": lambda z, y: (
        F.binary_cross_entropy_with_logits(z[..., 0], (y > 1).double(), (y != -100).double(), reduction="sum")
        / (y != -100).sum()
    ),
}


def cut(batch: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_rows_count_what_they_count_in_the_trainings_loss(name: str) -> None:
    model, batch = Words(LOSSES[name]), ragged()
    parameters = list(model.parameters())
    step_loss = model.training_step(batch, 0)
    step_gradient = torch.cat([g.flatten() for g in torch.autograd.grad(step_loss, parameters)])
    with isolated(model):
        losses = row_losses(model, batch)
        flat = FlatModule(model)
        for rows in (losses.rows(model, batch), losses.rows(model, batch, max_rows=4)):
            assert torch.allclose(losses.contributions(model, rows).mean(), step_loss, rtol=1e-12)
            posterior = LocalPosterior(flat, losses, rows, BIF(n_beta=30.0, localization=2.0))
            here = posterior.gradient(torch.zeros(1, len(flat.weights), dtype=torch.float64))[0]
            assert torch.allclose(30.0 * here, 30.0 * step_gradient, rtol=0, atol=1e-10)
            assert torch.allclose(posterior.mean_gradient, step_gradient, rtol=0, atol=1e-12)
        found = losses(model, rows).detach()
        away = flat.weights + 0.3 * torch.randn(2, len(flat.weights), dtype=torch.float64)
        far = flat.values(away, losses.contributions, rows).mean(1)  # rows' weights are the same at other model weights
    assert not flat.notes
    torch.nn.utils.vector_to_parameters(away[1], parameters)
    assert torch.allclose(far[1], model.training_step(batch, 0), rtol=1e-12)
    assert found[EMPTY] == 0 and rows.weights[EMPTY] == 0


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("half of it", "zeros are averaged too")])
def test_a_rows_loss_is_the_mean_of_its_own_terms(name: str) -> None:
    model, batch = Words(LOSSES[name]), ragged()
    with isolated(model):
        losses = row_losses(model, batch)
        found = losses(model, losses.rows(model, batch))
    for k in range(ROWS):
        row = cut(batch, [k])
        counted = (row["labels"] != -100).sum()
        if k == EMPTY or (name in ("shifted labels", "logits cut") and counted < 2):
            assert found[k] == 0
            continue
        alone = model.training_step(row, 0)  # the step's loss of a batch of one row is the mean over its terms
        alone = alone / counted if name == "a sum of each row" else alone
        assert torch.allclose(found[k], alone, rtol=1e-12), k


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda z, y: flat_ce(z, y, reduction="sum"), "grows with the rows"),
        (
            lambda z, y: ((1 - (-masked(z, y)[0]).exp()) ** 2 * masked(z, y)[0]).mean(),
            "no weighted sum of one's terms|adds",
        ),
        (
            lambda z, y: (lambda each: ((1 - (-each.detach()).exp()) * each).mean())(masked(z, y)[0]),
            "what the model says",
        ),
        (lambda z, y: flat_ce(z, y) + 1e-5 * z.square().mean(), "something else depends on the weights"),
        (lambda z, y: flat_ce(z, y) + F.mse_loss(z, z * 0), "adds up 2 of them"),
        (lambda z, y: F.cross_entropy(z.mean(1) @ z.mean(1).T, torch.arange(len(z))), "other rows are beside them"),
        (lambda z, y: -flat_ce(z, y), "negative"),
        (lambda z, y: flat_ce(z * torch.inf, y), "not finite"),
    ],
)
def test_what_cannot_be_told_is_refused(loss: Loss, why: str) -> None:
    with isolated(model := Words(loss)), pytest.raises(InfluenceError, match=f"({why}).*loss_fn="):
        row_losses(model, ragged())


class Logistic(L.LightningModule):
    """Logistic regression whose classes weigh unequally."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.weight = nn.Linear(3, 2, dtype=torch.float64), torch.tensor([0.2, 3.0], dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.w(batch[0]), batch[1], weight=self.weight)


def test_covariances_are_those_of_the_weighed_posterior() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 3, dtype=torch.float64), torch.arange(60) % 2
    model = Logistic()
    step = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def closure() -> Tensor:
        step.zero_grad()
        loss = model.training_step((x, y), 0) + 0.01 * model.w.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    step.step(closure)  # type: ignore[no-untyped-call]
    bif = BIF(draws=60, n_beta=4000.0, localization=40.0, batch_size=60, curvature_rows=60)
    found = bif_scores(model, (x, y), {"q": (x[:7], y[:7])}, bif, progress=False)
    # to first order: gᵢᵀ (n_beta H + γ)⁻¹ ∇φ with the Hessian of the training's loss
    parameters = list(model.parameters())

    def gradient(value: Tensor, create: bool = False) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, create_graph=create)])

    whole = gradient(model.training_step((x, y), 0), create=True)
    hessian = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(h, parameters, retain_graph=True)]) for h in whole]
    )
    inverse = torch.linalg.inv(4000.0 * hessian + 40.0 * torch.eye(8, dtype=torch.float64))
    rows = torch.stack([gradient(F.cross_entropy(model.w(x[[k]]), y[[k]])) for k in range(60)])
    truth = (rows @ inverse @ gradient(model.training_step((x[:7], y[:7]), 0))).numpy()
    assert np.corrcoef(found.scores[:, 0], truth)[0, 1] > 0.98
    assert 0.85 < found.scores[:, 0] @ truth / (truth @ truth) < 1.15
    assert any("counts rows unequally, 0.125 to 1.88 times the mean" in note for note in found.notes)


class Decoder(Words):
    """The same as a model that is fitted: dropout, a metric of the loss, a data set of rows of unlike length."""

    def __init__(self) -> None:
        super().__init__(flat_ce)
        self.drop, self.mean = nn.Dropout(0.2), MeanMetric()
        self.float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.out(self.drop(self.embed(batch["ids"]).tanh())), batch["labels"])
        self.log("mean", self.mean(loss.detach()))
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def padded(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """As long as the longest row of the batch."""
    ids, labels = (
        nn.utils.rnn.pad_sequence(list(part), True, fill)
        for part, fill in zip(zip(*items, strict=True), (0, -100), strict=True)
    )
    return {"ids": ids, "labels": labels}


@pytest.mark.long
@pytest.mark.parametrize("per_token", [False, True])
def test_a_fit_of_rows_of_unlike_length(per_token: bool) -> None:
    batch = ragged()
    rows = [(batch["ids"][k, :n], batch["labels"][k, :n]) for k, n in enumerate((batch["labels"] >= 0).sum(1)) if n]

    def fit(*methods: Any) -> tuple[Decoder, Any]:
        L.seed_everything(1, verbose=False)
        model = Decoder()
        callbacks = [InfluenceCallback(methods=list(methods), on_error="raise")] if methods else []
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)  # type: ignore[arg-type]
        train, val = (DataLoader(rows, batch_size=3, shuffle=s, collate_fn=padded) for s in (True, False))  # type: ignore[arg-type, var-annotated]
        trainer.fit(model, train, val)
        return model, callbacks

    plain, _ = fit()
    model, (influence,) = fit(FINE(), BIF(draws=16, chains=4, at=[1, "end"], per_token=per_token))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    found = influence.report.bif
    assert np.isfinite(found.scores).all() and len(found.scores) == len(rows) and len(influence.report.bif_stages) == 2
    assert any("counts rows unequally" in note for note in found.notes)
    if per_token:  # what is padded has no score
        assert np.allclose([found.tokens.of(k).sum(0) for k in range(len(rows))], found.scores, atol=1e-6)
        assert all((found.tokens.of(k)[len(ids) :] == 0).all() for k, (ids, _) in enumerate(rows))


def test_a_step_that_squeezes() -> None:
    """A batch of one row has no dimension left there; 17 rows leave one over from pieces of 8."""

    class Squeezes(Words):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.binary_cross_entropy_with_logits(self.out(batch["x"])[:, :1].squeeze(), batch["y"])

    batch = {"x": torch.randn(17, 4, dtype=torch.float64), "y": (torch.arange(17) % 2).double()}
    found = bif_scores(Squeezes(flat_ce), batch, {"q": batch}, BIF(draws=8, batch_size=4), progress=False)
    assert found.scores.shape == (17, 1) and np.isfinite(found.scores).all()


def test_rows_that_count_are_found_late() -> None:
    """The first 300 rows of a data set have no target at all, so that a batch of them has no loss."""
    many = {key: value.repeat(50, 1) for key, value in ragged().items()}
    many["labels"][:300] = -100
    model = Words(flat_ce)
    with isolated(model):
        losses = row_losses(model, many)
        rows = losses.rows(model, many)
        step_loss = model.training_step(many, 0)
        assert torch.allclose(losses.contributions(model, rows).mean(), step_loss, rtol=1e-12)
        assert not rows.weights[:300].any()


def test_a_users_losses_must_be_finite() -> None:
    def each(module: Any, batch: Any) -> Tensor:
        losses, mask = masked(module.out(module.embed(batch["ids"])), batch["labels"])
        return (losses * mask).sum(1) / mask.sum(1)

    with pytest.raises(InfluenceError, match="not finite for 1 of 10 rows, such as row 3; return 0 for a row without"):
        bif_scores(Words(flat_ce), ragged(), {"q": ragged()}, BIF(draws=8), each, progress=False)


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("batch_size", [4, ROWS])
def test_minibatches_and_a_row_without_a_token(batch_size: int, reduced: bool) -> None:
    model, batch = Words(LOSSES["a mask after the loss"]), ragged()
    found = bif_scores(
        model, batch, {"q": cut(batch, [0, 1])}, BIF(draws=24, batch_size=batch_size, reduced=reduced), progress=False
    )
    assert np.isfinite(found.scores).all() and found.scores[EMPTY] == 0 and found.p[EMPTY] == 1
    assert np.isfinite(found.p).all() and np.isfinite(found.q).all()
    assert any("1 rows have no term that counts: their scores are 0" in note for note in found.notes)
