"""Small models, a loop over rows with a pass each, and a recorded run to compare: the oracle of several tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, device, nn

from ine_callback import Recorder
from ine_callback.capture import register_layer
from ine_callback.methods import Method
from ine_callback.queries import CallableQuery
from ine_callback.scores import QueryInfo, Scores

# Older torch does not tell what activation checkpointing has saved, so that nothing saved is read a second time.
TELLS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")
EXACT = {"rtol": 1e-9, "atol": 1e-11}
Batch = tuple[Tensor, Tensor]


class Keep(Method):
    """A method that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor, float]] = []
        self.units: list[Tensor] = []

    def start(
        self,
        rows: int,
        queries: tuple[QueryInfo, ...],
        device: device,
        random_weights: bool = False,
        contrasts: int = 0,
    ) -> None:
        self.queries = queries

    def update(
        self, rows: Tensor, signals: Tensor, rate: float, unit: Tensor | None = None, *rest: Tensor | None
    ) -> None:
        self.steps.append((rows.clone(), signals.clone(), rate))
        assert unit is not None
        self.units.append(unit.clone())

    def compute(self) -> Scores:
        raise NotImplementedError

    def grow(self, rows: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


# -- models: each takes [b, ...] and returns logits [b, 3] (or [b, T, 3]) ----------------------------------------------


class Residual(nn.Module):
    """A small ResNet: convolutions with and without stride, BatchNorm in evaluation mode, an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.short, self.head = nn.Conv2d(4, 8, 1, stride=2), nn.Linear(8, 3)
        self.relu = nn.ReLU(inplace=True)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.two(self.relu(self.one(x)))) + self.short(x)
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """One causal block with its own attention, tied or free head, a position table that leads with 1."""

    def __init__(self, tied: bool = False, flat: bool = False) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(3, 4), nn.Parameter(torch.zeros(1, 5, 4), requires_grad=False)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4, bias=False)
        self.before, self.after = nn.LayerNorm(4), nn.RMSNorm(4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.head = nn.Linear(4, 3, bias=not tied)
        self.flat = flat
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.down(F.gelu(self.up(self.after(x))))
        return self.head(x.flatten(0, 1) if self.flat else x)


class Bag(nn.Module):
    """An embedding model: words looked up several times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


class Twice(nn.Module):
    """One module called twice, once on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        return self.head(self.norm(torch.tanh(self.layer(self.norm(x)))))


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@register_layer(Factor)
def _factor(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Tensor]:
    return {"factor": (a * delta).reshape(rows, -1, a.shape[-1]).sum(1)}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def opaque(p: Tensor) -> Tensor:
    """The parameter itself, by an operation that is not recognised: only the fallback records it."""
    return p.clamp(-1e9, 1e9)


class Bare(nn.Module):
    """A parameter that belongs to no known layer, and is used in no known way."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        token = opaque(self.token)
        return self.head(torch.tanh(x * token[0] + token[1]))


class Borrowed(nn.Module):
    """A weight used by its module and, functionally and in no known way, beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)) + F.linear(x, opaque(self.inner.weight)))


class PositionTable(nn.Module):
    """Positions looked up once for all rows: [T] ids beside [b, T] tokens."""

    def __init__(self, words: int = 5) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(3, 4), nn.Embedding(words, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids) + self.place(torch.arange(ids.shape[1]))))


class TimeFirst(nn.Module):
    """Reads [b, T, d] but works on [T, b, d]."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.inner, self.head, self.flat = nn.Linear(4, 4), nn.Linear(4, 3), flat

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        if self.flat:
            return self.head(torch.tanh(self.inner(x.reshape(-1, 4)).view(x.shape)).mean(0))
        return self.head(torch.tanh(self.inner(x)).mean(0))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def frozen() -> nn.Module:
    model = mlp()
    model[2].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    return model


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    logits = module(x)
    return F.cross_entropy(logits.reshape(-1, 3), y.reshape(-1))


def summed(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


def squares(module: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(module(batch[0]), F.one_hot(batch[1], 3).double(), reduction="sum")


def logit(module: nn.Module, batch: Batch) -> Tensor:
    return module(batch[0]).reshape(len(batch[1]), -1)[:, 0].mean()


@dataclass
class Setting:
    """A model and what it reads."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    words: bool = False
    each_token: bool = False
    uncaptured: str = "raise"

    def data(self, rows: int = 10) -> Batch:
        x = torch.randint(3, (rows, *self.shape)) if self.words else torch.randn(rows, *self.shape).double()
        return x, torch.randint(3, (rows, *self.shape) if self.each_token else (rows,))


SETTINGS = [
    Setting("mlp", mlp),
    Setting("frozen", frozen),
    Setting("resnet", Residual, (1, 6, 6)),
    Setting("transformer", Transformer, (5,), words=True, each_token=True),
    Setting("transformer-flattened", lambda: Transformer(flat=True), (5,), words=True, each_token=True),
    Setting("tied", lambda: Transformer(tied=True), (5,), words=True, each_token=True),
    Setting("bag", Bag, (5,), words=True),
    Setting("twice", Twice),
    Setting("custom", lambda: nn.Sequential(Factor(), nn.Linear(4, 4), Factor(), nn.Linear(4, 3))),
    Setting("lstm", Recurrent, (5, 4)),
    Setting("fallback-attention", Attention, (5, 4), uncaptured="fallback"),
    Setting("fallback-bare", Bare, uncaptured="fallback"),
    Setting(
        "fallback-prelu", lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 3)), uncaptured="fallback"
    ),
    Setting("fallback-borrowed", Borrowed, uncaptured="fallback"),
    Setting("fallback-positions", PositionTable, (5,), words=True, each_token=True, uncaptured="fallback"),
    Setting("fallback-time-first", TimeFirst, (4, 4), uncaptured="fallback"),
]
BY_NAME = {s.name: s for s in SETTINGS}


# -- the loop and the run ----------------------------------------------------------------------------------------------


def flat(parameters: Sequence[nn.Parameter], value: Tensor, factors: dict[nn.Parameter, float] | None = None) -> Tensor:
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    factors = factors or {}
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten() * factors.get(p, 1.0)
            for p, g in zip(parameters, grads, strict=True)
        ]
    )


def by_loop(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
    queries: Sequence[Callable[[nn.Module], Tensor]],
    coefficient: float,
    speed: dict[nn.Parameter, float] | None = None,
) -> Tensor:
    """<v_q, share_i>, and last <g_i, share_i>, where share_i = coefficient * g_i; ``speed``: relative rates."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    v = [flat(parameters, query(model), speed) for query in queries]
    model.train()
    out = []
    for k in range(len(batch[0])):
        g = flat(parameters, loss(model, (batch[0][k : k + 1], batch[1][k : k + 1])))
        weighted = torch.cat([torch.full((p.numel(),), (speed or {}).get(p, 1.0)).double() for p in parameters]) * g
        out.append(torch.stack([*(u @ g for u in v), weighted @ g]) * coefficient)
    return torch.stack(out).detach()


@dataclass
class Run:
    """What a recorded run leaves: the method's steps, the loop's truth, the recorder."""

    found: list[tuple[Tensor, Tensor, float]]
    expected: list[Tensor]
    rows: list[Tensor]
    recorder: Recorder
    model: nn.Module


def run(
    setting: Setting,
    steps: int = 3,
    batch_size: int = 4,
    loss: Callable[[nn.Module, Batch], Tensor] = cross_entropy,
    mean: bool = True,
    see: bool = True,
    accumulate: int = 1,
    groups: Callable[[nn.Module], Any] | None = None,
    speed: Callable[[nn.Module], dict[nn.Parameter, float]] = lambda model: {},
    **options: Any,
) -> Run:
    """Trains with plain SGD, ``accumulate`` micro-batches a step; every micro-batch brings its expected signals."""
    model = setting.model().double().train()
    x, y = setting.data()
    val, probe = setting.data(7), setting.data(3)
    optimizer = torch.optim.SGD(groups(model) if groups else model.parameters(), lr=0.1)
    keep = Keep()
    options = {"uncaptured": setting.uncaptured, "on_error": "raise", "discount": False, "refresh_every": 1, **options}
    queries = {"val": val, "logit": CallableQuery(logit, probe), "self": "self"}
    recorder = Recorder(
        model, optimizer, rows=len(x), queries=queries, loss=loss, methods=[keep], accumulate=accumulate, **options
    )
    truth: list[Callable[[nn.Module], Tensor]] = [lambda m: loss(m, val), lambda m: logit(m, probe)]
    expected, seen = [], []
    with recorder:
        for rows in torch.cat([torch.randperm(len(x)) for _ in range(4)])[: steps * accumulate * batch_size].split(
            batch_size
        ):
            batch = x[rows], y[rows]
            share = 1 / (accumulate * (len(rows) if mean else 1))
            expected.append(by_loop(model, loss, batch, truth, share, speed(model)))
            seen.append(rows)
            with recorder.batch(rows, batch):
                value = loss(model, batch) / accumulate
                if see:
                    recorder.see(value)
                value.backward()
            if len(seen) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return Run(keep.steps, expected, seen, recorder, model)


def check(result: Run, accumulate: int = 1, tolerance: dict[str, float] = EXACT) -> None:
    assert len(result.found) * accumulate == len(result.expected)
    for k, (rows, signals, rate) in enumerate(result.found):
        own = slice(k * accumulate, (k + 1) * accumulate)
        assert rate == pytest.approx(0.1)
        assert rows.tolist() == torch.cat(result.rows[own]).tolist()
        torch.testing.assert_close(signals, torch.cat(result.expected[own]), **tolerance)
