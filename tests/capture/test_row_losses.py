"""Row losses and scales read off the graph, against ``reduction="none"`` and plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.row_losses import read_loss

ROWS, CLASSES, TIME = 4, 3, 5
Reduce = Callable[[Callable[[str], Tensor]], Tensor]

REDUCTIONS: dict[str, Reduce] = {
    "mean": lambda f: f("mean"),
    "sum": lambda f: f("sum"),
    "none-mean": lambda f: f("none").mean(),
    "none-sum": lambda f: f("none").sum(),
    "mean-accumulated": lambda f: f("mean") / 3,
    "sum-over-count": lambda f: f("sum") / torch.tensor(7.0),
    "mean-times-constant": lambda f: f("mean") * 0.25 / 2,
    "constant-times-mean": lambda f: 0.25 * f("mean"),
    "sum-accumulated-scaled": lambda f: f("sum") / 2 * 1024.0,
    "none-mean-accumulated": lambda f: f("none").mean() / 2,
}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def check(loss: Tensor, terms: Tensor, weights: Tensor) -> None:
    """``terms`` and ``weights`` [b, n] are the unreduced losses without weights, and their weights."""
    reading = read_loss(loss, ROWS)
    assert reading is not None
    weighted = terms * weights
    rows = torch.stack([weighted[i].sum() / weights[i].sum().clamp_min(1e-12) for i in range(ROWS)])
    torch.testing.assert_close(reading.rows.double(), rows, rtol=1e-6, atol=1e-7)
    # each term enters the loss with one coefficient: its inverse is the sum of the terms over the loss
    count = weighted.sum() / loss.detach()
    torch.testing.assert_close(reading.terms.double(), count, rtol=1e-6, atol=0)
    torch.testing.assert_close(reading.scale.double(), count * ROWS / weights.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("layout", ["rows", "time-last", "flattened", "image"])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("class_weights", [False, True])
def test_cross_entropy(reduce: Reduce, layout: str, ignore: bool, class_weights: bool) -> None:
    space = {"rows": (), "time-last": (TIME,), "flattened": (TIME,), "image": (2, 3)}[layout]
    labels = torch.randint(CLASSES, (ROWS, *space))
    labels[0] = 2
    if ignore:
        labels.view(ROWS, -1)[1] = -100
        labels.view(-1)[-1] = -100
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64) if class_weights else None
    if layout == "flattened":
        logits = randn(ROWS, TIME, CLASSES)
        inputs = logits.flatten(0, 1), labels.flatten()
        terms = F.cross_entropy(*inputs, reduction="none").view(ROWS, -1)
    else:
        logits = randn(ROWS, CLASSES, *space)
        inputs = logits, labels
        terms = F.cross_entropy(logits, labels, reduction="none").reshape(ROWS, -1)
    loss = reduce(lambda how: F.cross_entropy(*inputs, weight=weight, reduction=how))
    flat = labels.reshape(ROWS, -1)
    weights = torch.ones_like(terms) if weight is None else weight[flat.clamp_min(0)]
    check(loss, terms.detach(), weights.masked_fill(flat < 0, 0.0))


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1), (ROWS, 2, 3)])
def test_mean_squared_error(reduce: Reduce, shape: tuple[int, ...]) -> None:
    x, y = randn(*shape), randn(*shape).detach()
    terms = (x.detach() - y).square().reshape(ROWS, -1)
    check(reduce(lambda how: F.mse_loss(x, y, reduction=how)), terms, torch.ones_like(terms))


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 3)])
@pytest.mark.parametrize("options", [{}, {"weight": 2.0}, {"pos_weight": 3.0}, {"weight": 0.5, "pos_weight": 4.0}])
def test_binary_cross_entropy_with_logits(reduce: Reduce, shape: tuple[int, ...], options: dict[str, float]) -> None:
    x, y = randn(*shape), torch.rand(shape, dtype=torch.float64).round()
    settings = {k: torch.full(shape[1:], v, dtype=torch.float64) for k, v in options.items()}
    p = torch.sigmoid(x.detach())
    terms = -options.get("pos_weight", 1.0) * y * p.log() - (1 - y) * (1 - p).log()
    terms = (options.get("weight", 1.0) * terms).reshape(ROWS, -1)
    loss = reduce(lambda how: F.binary_cross_entropy_with_logits(x, y, reduction=how, **settings))
    check(loss, terms, torch.ones_like(terms))


@pytest.mark.parametrize("ignore_index", [-100, 0, 2, -1])
def test_ignored_index(ignore_index: int) -> None:
    logits, labels = randn(ROWS, CLASSES, TIME), torch.randint(CLASSES, (ROWS, TIME))
    labels[:, 0] = ignore_index
    labels[:, 1] = 1
    terms = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none").detach()
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index)
    check(loss, terms, (labels != ignore_index).double())


def test_negative_log_likelihood() -> None:
    log_p, labels = randn(ROWS, CLASSES).log_softmax(1), torch.randint(CLASSES, (ROWS,))
    terms = F.nll_loss(log_p, labels, reduction="none").detach()[:, None]
    check(F.nll_loss(log_p, labels), terms, torch.ones_like(terms))


def test_a_loss_of_one_element_has_a_scalar_scale() -> None:
    """With a dimension it made tensors of double precision of others, and ended the recording."""
    value = F.cross_entropy(randn(ROWS, CLASSES), torch.randint(CLASSES, (ROWS,)))
    plain, reading = (read_loss(loss, ROWS) for loss in (value, value.reshape(1)))
    assert plain is not None and reading is not None and reading.terms.shape == reading.scale.shape == ()
    assert torch.equal(reading.terms, plain.terms) and torch.equal(reading.rows, plain.rows)


def test_reading_leaves_the_graph_usable() -> None:
    x = randn(ROWS, CLASSES)
    labels = torch.randint(CLASSES, (ROWS,))
    loss = F.cross_entropy(x, labels)
    read_loss(loss, ROWS)
    loss.backward()
    found, x.grad = x.grad, None
    F.cross_entropy(x, labels).backward()
    assert torch.equal(found, x.grad)


def _two(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y) + 0.1 * x.square().mean()


UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum-of-two": _two,
    "label-smoothing": lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    "soft-labels": lambda x, y: F.cross_entropy(x, F.one_hot(y, CLASSES).double()),
    "mask-of-a-mean": lambda x, y: (F.cross_entropy(x, y) * torch.ones(ROWS)).mean(),
    "two-masks": lambda x, y: (F.cross_entropy(x, y, reduction="none") * torch.ones(ROWS) * torch.ones(ROWS)).sum(),
    "learned-temperature": lambda x, y: F.cross_entropy(x, y) * x.mean(),
    "exponential": lambda x, y: F.cross_entropy(x, y).exp(),
    "first-rows-only": lambda x, y: F.cross_entropy(x, y, reduction="none")[:2].mean(),
    "rows-do-not-divide": lambda x, y: F.cross_entropy(x[:3], y[:3]),
    "constant": lambda x, y: torch.ones(()),
    "parameter": lambda x, y: x.flatten()[0].detach().requires_grad_(),
    "power": lambda x, y: F.cross_entropy(x, y) ** 2,
    "huber": lambda x, y: nn.HuberLoss()(x[:, 0], y.double()),
    "divided-by-learned": lambda x, y: 1.0 / F.cross_entropy(x, y),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_other_forms_are_not_guessed(make: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert read_loss(make(randn(ROWS, CLASSES), torch.randint(CLASSES, (ROWS,))), ROWS) is None


@pytest.mark.parametrize("left", [False, True])
def test_masked_mean_over_tokens(left: bool) -> None:
    tokens = 5
    logits, labels = randn(ROWS * tokens, CLASSES), torch.randint(CLASSES, (ROWS * tokens,))
    mask = (torch.rand(ROWS, tokens) < 0.6).double()
    mask[:, 0] = 1.0
    terms = F.cross_entropy(logits, labels, reduction="none").view(ROWS, tokens)
    loss = (mask * terms if left else terms * mask).sum() / mask.sum()
    reading = read_loss(loss / 2, ROWS)
    assert reading is not None
    torch.testing.assert_close(reading.rows, (terms * mask).sum(1).detach() / mask.sum(1))
    torch.testing.assert_close(reading.terms, 2 * mask.sum())
    torch.testing.assert_close(reading.scale, torch.tensor(2.0 * ROWS, dtype=torch.float64))
