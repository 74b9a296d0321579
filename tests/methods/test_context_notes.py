"""What a context cannot tell apart by rows it leaves out and names; what it could not check it notes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.errors import CaptureError
from ine_callback.methods.context import TOGETHER
from tests.helpers.contexts import CLASSES, EXACT, LABELS, VECTORS, WIDTH, bound, entropy, explicit, names_of
from tests.helpers.oracle import opaque


class Scale(nn.Module):
    """No layer function knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * opaque(self.factor)


class Outside(nn.Module):
    """A weight that is also used outside of its own module's call, in a way that is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.inner(x).tanh() + x @ opaque(self.inner.weight))
        return out


LEFT_OUT: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str], str]] = {
    "unknown layer": (
        lambda: nn.Sequential(Scale(), nn.Linear(WIDTH, CLASSES)), VECTORS, {"1.weight", "1.bias"},
        r"leave out 0\.factor: no layer function for Scale",
    ),
    "used outside": (
        Outside, VECTORS, {"out.weight", "out.bias"}, r"leave out inner\.weight: its per-sample gradients add up",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_cannot_be_told_apart_by_rows_is_left_out_and_named(case: str) -> None:
    make, x, kept, told = LEFT_OUT[case]
    torch.manual_seed(0)
    context = bound(make().double(), entropy, (x, LABELS[: len(x)]))
    names = names_of(context.module)
    for _, gradients in context.per_sample():
        assert {names[p] for block in gradients for p in block.parameters} == kept
    assert any(re.search(told, note) for note in context.notes), context.notes


def test_a_loss_of_an_unknown_form_is_noted() -> None:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.l1_loss(module(batch[0])[:, 0], batch[0][:, 0])

    context = bound(nn.Linear(WIDTH, 1).double(), loss, (VECTORS, LABELS))
    truth = explicit(context.module, loss, (VECTORS,), ["weight", "bias"])
    for part, gradients in context.per_sample():
        (block,) = gradients
        expected = block.to_layout([truth["weight"][part], truth["bias"][part]])
        torch.testing.assert_close(gradients.formed(block), expected, **EXACT)
    (note,) = context.notes
    assert "the loss is of an unknown form, and taken as a mean over a batch's rows" in note


class MixedInTraining(nn.Module):
    """Mixup in training mode, as nobody's evaluation does it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out((x + x.flip(0)) / 2 if self.training else x)
        return out


def test_mixup_in_training_mode_is_no_fault_of_passes_in_evaluation_mode() -> None:
    context = bound(MixedInTraining().double(), entropy, (VECTORS, LABELS))
    truth = explicit(context.module, entropy, (VECTORS, LABELS), ["out.weight", "out.bias"])
    for part, gradients in context.per_sample():
        (block,) = gradients
        expected = block.to_layout([truth["out.weight"][part], truth["out.bias"][part]])
        torch.testing.assert_close(gradients.formed(block), expected, **EXACT)
    assert not context.notes and context.module.training


def test_a_loss_that_needs_whole_batches_is_noted_and_read() -> None:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) not in (TOGETHER, len(VECTORS) % TOGETHER):
            raise ValueError("whole batches only")
        return entropy(module, batch)

    context = bound(nn.Linear(WIDTH, CLASSES).double(), loss, (VECTORS, LABELS))
    assert sum(len(part) for part, _ in context.per_sample()) == len(VECTORS)
    (note,) = context.notes
    assert "the order of rows inside the layers was not checked (ValueError: whole batches only)" in note


def test_nothing_to_tell_apart_is_an_error() -> None:
    context = bound(nn.Sequential(Scale()).double(), lambda m, batch: F.mse_loss(m(batch[0]), batch[0] * 2), (VECTORS,))
    with pytest.raises(CaptureError, match=r"Test: no layer's gradients can be told apart by rows"):
        next(context.per_sample())
