"""Bare parameters: every row's gradients are read at the operations that use them, against a loop over the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.oracle import Recurrent, Setting, check, run
from tests.helpers.vision import Vision, needs_saved, parameter


class Plain(nn.Module):
    """A linear layer, a use of bare parameters between, and a head: [b, 5, 4] -> [b, 3]."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        for name, shape in shapes.items():
            self.register_parameter(name, parameter(*shape))

    def use(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(self.first(x))).mean(1))


def plain(use: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: type("Using", (Plain,), {"use": use})(**shapes)


class Attending(nn.Module):
    """Attention of torch in one of its forms: [b, 5, 4] -> [b, 3]."""

    def __init__(self, form: str, **options: Any) -> None:
        super().__init__()
        self.form, self.attention, self.head = form, nn.MultiheadAttention(4, 2, **options), nn.Linear(4, 3)
        self.other = nn.Linear(4, self.attention.kdim)
        for p in self.attention.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x[:, :3])
        if not self.attention.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        key, value = {"self": (x, x), "cross": (y, y), "three": (y, 2 * y)}[self.form]
        x = self.attention(x, key, value, need_weights=self.form == "three")[0]
        return self.head(torch.tanh(x).mean(1 if self.attention.batch_first else 0))


class Wrapped(nn.Linear):
    """Its first input is no tensor, so its hooks read nothing."""

    def forward(self, scale: float, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


class CallsWrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Wrapped(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(0.5, x=x)))


class Recurrences(Recurrent):
    """Recurrent layers with a forward of their own, which a CPU computes step by step by linear ones (in float64)."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        own = type("Own", (kind,), {"forward": lambda self, x: kind.forward(self, x)})
        self.lstm = own(4, 3, **options)
        self.head = nn.Linear(3 * (1 + self.lstm.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.lstm.batch_first:
            return self.head(self.lstm(x)[0].sum(1))
        return self.head(self.lstm(x.transpose(0, 1))[0].sum(0))


class Cosine(nn.Module):
    """Logits scaled by exp of a parameter, or divided by it."""

    def __init__(self, shape: tuple[int, ...], divided: bool = False) -> None:
        super().__init__()
        self.inner, self.classes, self.divided = nn.Linear(4, 4), nn.Linear(4, 3), divided
        self.scale = nn.Parameter(torch.full(shape, 0.7))

    def forward(self, x: Tensor) -> Tensor:
        logits = F.normalize(self.classes(torch.tanh(self.inner(x))), dim=-1)
        return logits / self.scale if self.divided else logits * self.scale.exp()


class Words(nn.Module):
    """Positions looked up once for all rows, as GPT-2 does; ids [T] or [1, T]."""

    def __init__(self, lead: bool) -> None:
        super().__init__()
        self.embed, self.place, self.head, self.lead = nn.Embedding(3, 4), nn.Embedding(7, 4), nn.Linear(4, 3), lead

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        return self.head(torch.tanh(self.embed(ids) + self.place(at[None] if self.lead else at)))


class Averaging(nn.Module):
    """Time first and flattened, one gradient at all positions: rows told apart wrongly change places, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.shift = nn.Linear(4, 4), nn.Linear(4, 3), parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x).transpose(0, 1)
        return self.head((z.flatten(0, 1) + self.shift).view_as(z).mean(0))


SERIES = (5, 4)
ADDED = [
    Setting(
        "class token", plain(lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1), token=(1, 1, 4)), SERIES
    ),
    Setting(
        "token repeated", plain(lambda m, x: torch.cat([m.token.repeat(len(x), 1, 1), x], 1), token=(1, 1, 4)), SERIES
    ),
    Setting("[D] expanded", plain(lambda m, x: torch.cat([m.token.expand(len(x), 1, 4), x], 1), token=(4,)), SERIES),
    Setting("table [1, T, D]", plain(lambda m, x: x + m.place, place=(1, 5, 4)), SERIES),
    Setting("table [T, D]", plain(lambda m, x: x + m.place, place=(5, 4)), SERIES),
    Setting("table, added in place", plain(lambda m, x: (x * 1).add_(m.place), place=(5, 4)), SERIES),
    Setting("part of a table", plain(lambda m, x: x + m.place[:, :5], place=(1, 9, 4)), SERIES),
    Setting("two tables", plain(lambda m, x: x + (m.a[:, None] + m.b).flatten(0, 1)[:5], a=(2, 4), b=(3, 4)), SERIES),
    Setting("a transposed table", plain(lambda m, x: x + m.place.T, place=(4, 5)), SERIES),
    Setting("one number", plain(lambda m, x: x + m.shift, shift=()), SERIES),
    Setting("time first", plain(lambda m, x: (x.transpose(0, 1) + m.place).transpose(0, 1), place=(5, 1, 4)), SERIES),
    Setting("flattened", plain(lambda m, x: (x.flatten(0, 1) + m.shift).view_as(x), shift=(4,)), SERIES),
    Setting("flattened and averaged", Averaging, SERIES),
    Setting("used twice", plain(lambda m, x: torch.tanh(x + m.place) + m.place[0], place=(5, 4)), SERIES),
]
SAVED = [
    Setting("ViT, batch first", lambda: Vision(True), SERIES),
    Setting("ViT, time first", lambda: Vision(False), SERIES),
    Setting("self-attention", lambda: Attending("self", batch_first=True), SERIES),
    Setting("self-attention, time first", lambda: Attending("self"), SERIES),
    Setting("self-attention, no bias", lambda: Attending("self", bias=False), SERIES),
    Setting("self-attention, bias of keys", lambda: Attending("self", add_bias_kv=True), SERIES),
    Setting("cross-attention", lambda: Attending("cross", batch_first=True), SERIES),
    Setting("cross-attention, time first", lambda: Attending("cross"), SERIES),
    Setting("attention to three", lambda: Attending("three"), SERIES),
    Setting("attention, other widths", lambda: Attending("cross", kdim=6, vdim=6), SERIES),
    Setting("layer scale", plain(lambda m, x: x + torch.sin(x) * m.gamma, gamma=(4,)), SERIES),
    Setting(
        "layer scale, time first", plain(lambda m, x: (x.mT.mT.transpose(0, 1) * m.g).transpose(0, 1), g=(4,)), SERIES
    ),
    Setting("scale and square", plain(lambda m, x: torch.tanh(x * m.g) * m.g, g=(5, 4)), SERIES),
    Setting("logit scale []", lambda: Cosine(())),
    Setting("logit scale [1]", lambda: Cosine((1,))),
    Setting("temperature", lambda: Cosine((1,), divided=True)),
    Setting("functional", plain(lambda m, x: F.linear(x, m.w, m.b), w=(4, 4), b=(4,)), SERIES),
    Setting("a product [I, O]", plain(lambda m, x: x @ m.w, w=(4, 4)), SERIES),
    Setting("parts of a weight", plain(lambda m, x: F.linear(x, m.w[2:6]) + x @ m.w[1:5].T, w=(7, 4)), SERIES),
    Setting("layer with another first input", CallsWrapped),
    Setting("LSTM", lambda: Recurrences(nn.LSTM, batch_first=True, num_layers=2, bidirectional=True), SERIES),
    Setting("LSTM, time first", lambda: Recurrences(nn.LSTM), SERIES),
    Setting("GRU", lambda: Recurrences(nn.GRU, batch_first=True, num_layers=2), SERIES),
    Setting("RNN", lambda: Recurrences(nn.RNN), SERIES),
    Setting("entries of a table", plain(lambda m, x: x - m.place[torch.arange(5) // 2], place=(3, 4)), SERIES),
    Setting("looked up, [T]", lambda: Words(False), (5,), words=True, each_token=True),
    Setting("looked up, [1, T]", lambda: Words(True), (5,), words=True, each_token=True),
    Setting("mask token", plain(lambda m, x: torch.where(x[..., :1] > 0, x, m.token), token=(1, 1, 4)), SERIES),
]


def named(settings: list[Setting]) -> dict[str, Any]:
    return {"argvalues": settings, "ids": [s.name for s in settings]}


@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize("setting", **named(ADDED))
def test_rows_gradients_are_those_of_a_loop(setting: Setting, rows: int) -> None:
    """Also where the batch has as many rows as a row has positions (5)."""
    torch.manual_seed(0)
    check(run(setting, batch_size=rows, steps=2))


@needs_saved
@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize("setting", **named(SAVED))
def test_rows_gradients_are_those_of_a_loop_where_operations_saved_what_is_needed(setting: Setting, rows: int) -> None:
    torch.manual_seed(0)
    check(run(setting, batch_size=rows, steps=2))
