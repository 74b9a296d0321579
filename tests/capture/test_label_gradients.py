"""Gradients for drawn and for all labels, against Fisher information matrices written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.label_gradients import MAX_CLASSES, expect, labels_of, sample
from ine_callback.errors import InfluenceError
from tests.helpers.cases import mostly_long

ROWS, IN, OUT, TERMS, DRAWS = 3, 2, 3, 4, 4000
G = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, IN, generator=G, dtype=torch.float64)
W = torch.randn(OUT, IN, generator=G, dtype=torch.float64)
LABELS = torch.tensor([0, 2, 2])
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def softmax_fisher(logits: Tensor) -> Tensor:
    """E[g gᵀ] of g = ∇ −log p(y) by the logits, over the labels one by one."""
    p = logits.softmax(-1)
    return sum(
        (
            p[c] * torch.outer(p - F.one_hot(torch.tensor(c), OUT), p - F.one_hot(torch.tensor(c), OUT))
            for c in range(OUT)
        ),
        torch.zeros(OUT, OUT, dtype=p.dtype),
    )


def logit_gradients(loss: Callable[[Tensor], Tensor], prepare: Callable[[Tensor], None]) -> Tensor:
    """Gradient by the outputs of a linear model, of a loss whose labels ``prepare`` exchanges."""
    weight = W.clone().requires_grad_()
    out = X @ weight.mT
    found = loss(out)
    prepare(found)
    (gradient,) = torch.autograd.grad(found, out)
    return gradient


def within_four_errors(draws: Tensor, truth: Tensor) -> None:
    """Outer products [n, K, K] have the mean ``truth``."""
    mean, error = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    assert ((mean - truth).abs() <= 4 * error + 1e-12).all(), (mean - truth, error)


def outer(gradients: Tensor) -> Tensor:
    return gradients[..., :, None] * gradients[..., None, :]


def drawn(loss: Callable[[Tensor], Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([logit_gradients(loss, lambda found: sample(found, generator)) for _ in range(DRAWS)])


SOFTMAX: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    # loss of the outputs [ROWS, OUT], and the coefficient of each row's loss in it
    "mean": (lambda out: F.cross_entropy(out, LABELS), 1 / ROWS),
    "sum": (lambda out: F.cross_entropy(out, LABELS, reduction="sum"), 1.0),
    "none, mean": (lambda out: F.cross_entropy(out, LABELS, reduction="none").mean(), 1 / ROWS),
    "nll": (lambda out: F.nll_loss(F.log_softmax(out, 1), LABELS), 1 / ROWS),
    "divided": (lambda out: F.cross_entropy(out, LABELS) / 8, 1 / ROWS / 8),
    "divided twice, summed": (lambda out: 3 * F.cross_entropy(out, LABELS, reduction="sum") / 7, 3 / 7),
    "class weights": (
        lambda out: F.cross_entropy(out, LABELS, CLASS_WEIGHTS),
        CLASS_WEIGHTS[LABELS] / CLASS_WEIGHTS[LABELS].sum(),
    ),
    "ignored": (
        lambda out: F.cross_entropy(out, LABELS.masked_fill(LABELS == 0, -100)),
        torch.tensor([0.0, 0.5, 0.5]).double(),
    ),
    "masked": (
        lambda out: (F.cross_entropy(out, LABELS, reduction="none") * torch.tensor([2.0, 0.0, 1.0])).sum() / 3,
        torch.tensor([2.0, 0.0, 1.0]).double() / 3,
    ),
}


@pytest.mark.parametrize("case", mostly_long(SOFTMAX, "class weights", "masked"))
def test_drawn_classes_have_the_exact_fisher(case: str) -> None:
    loss, coefficient = SOFTMAX[case]
    found, scale = drawn(loss), torch.as_tensor(coefficient, dtype=torch.float64).expand(ROWS)
    for row, logits in enumerate(X @ W.mT):
        within_four_errors(outer(found[:, row]), scale[row] ** 2 * softmax_fisher(logits))
    assert found.mean(0).abs().max() < 0.1  # a score has the mean 0, which the data's labels have not


@pytest.mark.parametrize("case", SOFTMAX)
def test_all_classes_have_the_exact_fisher(case: str) -> None:
    loss, coefficient = SOFTMAX[case]
    probe = loss((X @ W.mT).requires_grad_())
    assert labels_of(probe, ROWS) == OUT
    found = torch.stack([logit_gradients(loss, lambda each, c=c: expect(each, c, ROWS)) for c in range(OUT)])
    scale = torch.as_tensor(coefficient, dtype=torch.float64).expand(ROWS)
    for row, logits in enumerate(X @ W.mT):
        truth = scale[row] ** 2 * softmax_fisher(logits)
        assert torch.allclose(outer(found[:, row]).sum(0), truth, rtol=1e-10, atol=1e-14), case


@pytest.mark.parametrize("flat", [True, False])
def test_labels_of_each_term_are_drawn_apart(flat: bool) -> None:
    """Logits [b, C, T], or flattened: a row's gradient is the mean over its terms, and terms do not covary."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(1, OUT, TERMS, generator=g, dtype=torch.float64)
    labels = torch.randint(OUT, (1, TERMS), generator=g)
    labels[0, 1] = -100
    generator, found = torch.Generator().manual_seed(3), []
    for _ in range(DRAWS):
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(leaf.mT.flatten(0, 1), labels.flatten()) if flat else F.cross_entropy(leaf, labels)
        sample(loss, generator)
        found.append(torch.autograd.grad(loss, leaf)[0][0].mT.flatten())
    truth = torch.zeros(TERMS * OUT, TERMS * OUT, dtype=torch.float64)
    for t in (0, 2, 3):
        part = slice(t * OUT, (t + 1) * OUT)
        truth[part, part] = softmax_fisher(logits[0, :, t]) / 9
    within_four_errors(outer(torch.stack(found)), truth)


BITS = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
POSITIVE = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
BERNOULLI: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "mean": (lambda out: F.binary_cross_entropy_with_logits(out, BITS), 1 / BITS.numel()),
    "sum": (lambda out: F.binary_cross_entropy_with_logits(out, BITS, reduction="sum"), 1.0),
    "none, mean": (
        lambda out: F.binary_cross_entropy_with_logits(out, BITS, reduction="none").mean(),
        1 / BITS.numel(),
    ),
    "half": (lambda out: 0.5 * F.binary_cross_entropy_with_logits(out, BITS), 0.5 / BITS.numel()),
    "weight": (lambda out: F.binary_cross_entropy_with_logits(out, BITS, POSITIVE), POSITIVE / BITS.numel()),
    "positives' weight": (
        lambda out: F.binary_cross_entropy_with_logits(out, BITS, pos_weight=POSITIVE),
        (1 + (POSITIVE - 1) * BITS) / BITS.numel(),
    ),
}


@pytest.mark.parametrize("case", mostly_long(BERNOULLI, "positives' weight"))
def test_drawn_bits_have_the_exact_fisher(case: str) -> None:
    loss, coefficient = BERNOULLI[case]
    found = drawn(loss)
    p = (X @ W.mT).sigmoid()
    scale = torch.as_tensor(coefficient, dtype=torch.float64).expand(ROWS, OUT)
    for row in range(ROWS):
        within_four_errors(outer(found[:, row]), torch.diag(scale[row] ** 2 * p[row] * (1 - p[row])))


NORMAL: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "mean": (lambda out: F.mse_loss(out, BITS), 1 / BITS.numel()),
    "sum": (lambda out: F.mse_loss(out, BITS, reduction="sum"), 1.0),
    "none, mean": (lambda out: F.mse_loss(out, BITS, reduction="none").mean(), 1 / BITS.numel()),
    "half": (lambda out: F.mse_loss(out, BITS) / 2, 0.5 / BITS.numel()),
    "the other way round": (lambda out: F.mse_loss(BITS, out), 1 / BITS.numel()),
}


@pytest.mark.parametrize("case", mostly_long(NORMAL, "half", "the other way round"))
def test_drawn_numbers_have_the_exact_fisher(case: str) -> None:
    """(y − t)² is −log of a normal density with variance 1/2, whose Fisher information by y is 2."""
    loss, coefficient = NORMAL[case]
    found = drawn(loss)
    for row in range(ROWS):
        within_four_errors(outer(found[:, row]), 2 * coefficient**2 * torch.eye(OUT, dtype=torch.float64))


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "label smoothing": lambda out: F.cross_entropy(out, LABELS, label_smoothing=0.1),
    "soft labels": lambda out: F.cross_entropy(out, BITS),
    "a penalty beside it": lambda out: F.cross_entropy(out, LABELS) + 0.1 * out.square().mean(),
    "two losses": lambda out: F.cross_entropy(out, LABELS) + F.mse_loss(out, BITS),
    "weighted by the model": lambda out: (F.cross_entropy(out, LABELS, reduction="none") * out[:, 0]).sum(),
    "labels with a gradient": lambda out: F.mse_loss(out, out.flip(0)),
    "another loss": lambda out: F.l1_loss(out, BITS),
    "no loss": lambda out: out.sum(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_losses_of_another_form_are_refused(case: str) -> None:
    out = (X @ W.mT).requires_grad_()
    for refuse in (sample, lambda loss: labels_of(loss, ROWS), lambda loss: expect(loss, 0, ROWS)):
        with pytest.raises(InfluenceError, match=r"without label smoothing.*use labels='true'"):
            refuse(REFUSED[case](out))


def test_labels_that_cannot_be_listed_are_refused() -> None:
    out = (X @ W.mT).requires_grad_()
    assert (
        labels_of(F.mse_loss(out, BITS), ROWS) == labels_of(F.binary_cross_entropy_with_logits(out, BITS), ROWS) == OUT
    )
    logits, labels = torch.zeros(ROWS, OUT, TERMS, requires_grad=True), torch.zeros(ROWS, TERMS, dtype=torch.int64)
    for loss in (F.cross_entropy(logits, labels), F.cross_entropy(logits.mT.flatten(0, 1), labels.flatten())):
        with pytest.raises(InfluenceError, match=r"with several terms a row has no list of labels"):
            labels_of(loss, ROWS)
    wide = torch.zeros(ROWS, MAX_CLASSES + 1, requires_grad=True)
    with pytest.raises(InfluenceError, match=r"65 classes need as many backward passes a batch, at most 64"):
        labels_of(F.cross_entropy(wide, LABELS), ROWS)
    assert labels_of(F.cross_entropy(wide[:, :-1], LABELS), ROWS) == MAX_CLASSES


def test_draws_are_repeated_by_their_generator_alone() -> None:
    module = nn.Linear(IN, OUT).double()

    def gradient(seed: int) -> Tensor:
        loss = F.cross_entropy(module(X), LABELS)
        sample(loss, torch.Generator().manual_seed(seed))
        return torch.autograd.grad(loss, module.weight)[0]

    state = torch.get_rng_state()
    assert torch.equal(gradient(3), gradient(3)) and not torch.equal(gradient(3), gradient(4))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_losss_precision(dtype: torch.dtype) -> None:
    for loss in (lambda out: F.cross_entropy(out, LABELS), lambda out: F.mse_loss(out, BITS.to(dtype))):
        out = (X @ W.mT).to(dtype).requires_grad_()
        found = loss(out)
        sample(found, torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(found, out)
        assert gradient.dtype == dtype and gradient.isfinite().all()
