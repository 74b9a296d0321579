"""Signals of whole models through the recorder, against a loop over rows with a forward and backward pass each."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, device, nn

from ine_callback import Recorder
from ine_callback.capture import register_layer
from ine_callback.errors import CaptureError, RowsError
from ine_callback.methods import Method
from ine_callback.queries import CallableQuery
from ine_callback.scores import QueryInfo, Scores

EXACT = {"rtol": 1e-9, "atol": 1e-11}
Batch = tuple[Tensor, Tensor]


class Keep(Method):
    """A method that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor, float]] = []

    def start(self, rows: int, queries: tuple[QueryInfo, ...], device: device) -> None:
        self.queries = queries

    def fold(self, rows: Tensor, signals: Tensor, rate: float) -> None:
        self.steps.append((rows.clone(), signals.clone(), rate))

    def finish(self) -> Scores:
        raise NotImplementedError

    def grow(self, rows: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


# -- models: each takes [b, ...] and returns logits [b, 3] (or [b, T, 3]) ------------------------------------------------


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


class Bare(nn.Module):
    """A parameter that belongs to no known layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * self.token[0] + self.token[1]))


class Borrowed(nn.Module):
    """A weight used by its module and, functionally, beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)) + F.linear(x, self.inner.weight))


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
    Setting("fallback-lstm", Recurrent, (5, 4), uncaptured="fallback"),
    Setting("fallback-attention", Attention, (5, 4), uncaptured="fallback"),
    Setting("fallback-bare", Bare, uncaptured="fallback"),
    Setting("fallback-borrowed", Borrowed, uncaptured="fallback"),
    Setting("fallback-positions", PositionTable, (5,), words=True, each_token=True, uncaptured="fallback"),
    Setting("fallback-time-first", TimeFirst, (4, 4), uncaptured="fallback"),
]
BY_NAME = {s.name: s for s in SETTINGS}


# -- the loop and the run ------------------------------------------------------------------------------------------------


def flat(parameters: Sequence[nn.Parameter], value: Tensor, factors: dict[nn.Parameter, float] | None = None) -> Tensor:
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    factors = factors or {}
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() * factors.get(p, 1.0) for p, g in zip(parameters, grads, strict=True)]
    )


def by_loop(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
    queries: Sequence[Callable[[nn.Module], Tensor]],
    coefficient: float,
    speed: dict[nn.Parameter, float] | None = None,
) -> Tensor:
    """<v_q, share_i>, and last <g_i, share_i>, where share_i = coefficient * g_i; ``speed``: relative learning rates."""
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
        for rows in torch.cat([torch.randperm(len(x)) for _ in range(4)])[: steps * accumulate * batch_size].split(batch_size):
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


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_signals_equal_a_loop_over_rows(setting: Setting) -> None:
    result = run(setting)
    check(result)
    assert result.recorder.coverage.share == 1.0
    assert result.recorder.infos[-1].name == "self"
    assert float(torch.cat(result.expected).abs().min(0).values.max()) > 0


@pytest.mark.parametrize("name", ["mlp", "transformer", "twice", "fallback-bare"])
def test_gradient_accumulation(name: str) -> None:
    check(run(BY_NAME[name], accumulate=2), accumulate=2)
    check(run(BY_NAME[name], accumulate=2, see=False), accumulate=2)


@pytest.mark.parametrize("name", ["mlp", "resnet", "twice", "bag", "fallback-bare"])
def test_sum_reduction(name: str) -> None:
    check(run(BY_NAME[name], loss=summed, mean=False))


@pytest.mark.parametrize("name", ["mlp", "twice", "fallback-bare"])
def test_sum_over_several_terms_a_row(name: str) -> None:
    """A row's own loss is the mean of its terms: its share of the sum is three times its gradient."""
    result = run(BY_NAME[name], loss=squares, mean=False)
    for expected in result.expected:
        expected[:, -1] /= 3
    check(result, tolerance={"rtol": 1e-6, "atol": 1e-9})  # the scale is read in float32


@pytest.mark.parametrize("model", [Transformer, PositionTable])
def test_rows_with_unequal_numbers_of_terms(model: Callable[[], nn.Module]) -> None:
    """A row's share is its part of the sum over all tokens, also where it has none, captured or by the fallback."""
    net, keep = model().double(), Keep()
    ids = torch.randint(3, (4, 5))
    labels = torch.tensor([[0, 1, 2, 1, 0], [-1, 1, -1, -1, 2], [-1] * 5, [0, -1, 1, 2, 2]])

    def loss(module: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-1, reduction=reduction)

    query = ids[:2], labels[:2]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = Recorder(
        net, optimizer, 4, {"val": query}, loss, [keep], discount=False, uncaptured="fallback", on_error="raise"
    )
    expected = by_loop(net, lambda m, b: loss(m, b, "sum"), (ids, labels), [lambda m: loss(m, query)], 1 / 11)[:, :1]
    with recorder:
        with recorder.batch(torch.arange(4), (ids, labels)):
            value = loss(net, (ids, labels))
            recorder.see(value)
            value.backward()
        optimizer.step()
    torch.testing.assert_close(keep.steps[0][1], expected, rtol=1e-6, atol=1e-9)
    assert keep.steps[0][1][2] == 0


def test_last_batch_is_smaller() -> None:
    result = run(BY_NAME["transformer"], steps=8, batch_size=6)
    assert {len(rows) for rows in result.rows} == {6, 4}
    check(result)


def test_batches_of_one_row() -> None:
    check(run(BY_NAME["mlp"], batch_size=1))


def test_parameter_groups_with_their_own_learning_rates() -> None:
    def groups(model: nn.Module) -> Any:
        return [{"params": model[0].parameters()}, {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.03}]

    def speed(model: nn.Module) -> dict[nn.Parameter, float]:
        return {p: 0.3 for layer in (model[2], model[4]) for p in layer.parameters()}

    # the rates are float32 beside the loss scale
    check(run(BY_NAME["mlp"], groups=groups, speed=speed), tolerance={"rtol": 1e-6, "atol": 1e-9})


def test_weight_and_bias_with_their_own_learning_rates() -> None:
    """A layer's weight and bias share one record, but not always one learning rate."""

    def groups(model: nn.Module) -> Any:
        weights = [p for p in model.parameters() if p.dim() > 1]
        return [{"params": weights}, {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.2}]

    check(run(BY_NAME["mlp"], groups=groups, speed=lambda model: {p: 2.0 for p in model.parameters() if p.dim() == 1}))


def test_parameters_that_the_optimizer_does_not_hold_get_no_signal() -> None:
    check(
        run(
            BY_NAME["mlp"],
            groups=lambda model: [p for n, p in model.named_parameters() if n not in ("0.weight", "0.bias", "4.bias")],
            speed=lambda model: {p: 0.0 for n, p in model.named_parameters() if n in ("0.weight", "0.bias", "4.bias")},
        )
    )


def test_refreshing_seldom_keeps_the_directions() -> None:
    """Between refreshes the direction is the one of the last refresh (step 0 and step 2)."""
    setting = BY_NAME["mlp"]
    result = run(setting, steps=4, refresh_every=2)
    for k in (0, 2):
        torch.testing.assert_close(result.found[k][1], result.expected[k], **EXACT)
    assert (result.found[1][1][:, :2] - result.expected[1][:, :2]).abs().max() > 1e-6
    torch.testing.assert_close(result.found[1][1][:, 2], result.expected[1][:, 2], **EXACT)


def test_two_backward_passes_of_one_batch_add_up() -> None:
    model, x, y = mlp().double(), torch.randn(4, 4).double(), torch.randint(3, (4,))
    optimizer, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    recorder = Recorder(model, optimizer, 4, {"val": (x, y)}, cross_entropy, [keep], on_error="raise", discount=False)
    expected = by_loop(model, cross_entropy, (x, y), [lambda m: cross_entropy(m, (x, y))], 0.25)[:, :1]
    with recorder, recorder.batch(torch.arange(4), (x, y)):
        for part in (0.25, 0.75):
            (part * cross_entropy(model, (x, y))).backward()
            recorder.after_backward()
        optimizer.step()
    torch.testing.assert_close(keep.steps[0][1], expected, **EXACT)


def test_a_skipped_step_leaves_nothing() -> None:
    model, x, y = mlp().double(), torch.randn(4, 4).double(), torch.randint(3, (4,))
    optimizer, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    recorder = Recorder(model, optimizer, 4, "self", cross_entropy, [keep], on_error="raise", discount=False)
    with recorder:
        for skip in (True, False):
            expected = by_loop(model, cross_entropy, (x, y), [], 0.25)
            with recorder.batch(torch.arange(4), (x, y)):
                cross_entropy(model, (x, y)).backward()
            if skip:
                recorder.discard()
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert len(keep.steps) == 1
    torch.testing.assert_close(keep.steps[0][1], expected, **EXACT)


def test_clipping_scales_the_signals() -> None:
    model, x, y = mlp().double(), torch.randn(4, 4).double(), torch.randint(3, (4,))
    optimizer, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    recorder = Recorder(model, optimizer, 4, {"val": (x, y)}, cross_entropy, [keep], on_error="raise", discount=False)
    expected = by_loop(model, cross_entropy, (x, y), [lambda m: cross_entropy(m, (x, y))], 0.25)[:, :1]
    with recorder:
        with recorder.batch(torch.arange(4), (x, y)):
            cross_entropy(model, (x, y)).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        recorder.measure_clipping()
        torch.nn.utils.clip_grad_norm_(model.parameters(), float(norm) / 10)
        optimizer.step()
    torch.testing.assert_close(keep.steps[0][1], expected / 10, rtol=1e-4, atol=0)


def test_loss_scaling_is_undone() -> None:
    model, x, y = mlp().double(), torch.randn(4, 4).double(), torch.randint(3, (4,))
    optimizer, keep = torch.optim.SGD(model.parameters(), lr=0.1), Keep()
    recorder = Recorder(model, optimizer, 4, {"val": (x, y), "self": "self"}, cross_entropy, [keep], on_error="raise", discount=False)
    expected = by_loop(model, cross_entropy, (x, y), [lambda m: cross_entropy(m, (x, y))], 0.25)
    with recorder:
        recorder.capture.unscale = torch.tensor(1 / 1024)
        with recorder.batch(torch.arange(4), (x, y)):
            scaled = cross_entropy(model, (x, y)) * 1024
            recorder.see(scaled)
            scaled.backward()
        optimizer.step()
    torch.testing.assert_close(keep.steps[0][1], expected, **EXACT)


# -- what cannot be captured ---------------------------------------------------------------------------------------------

NAMED = [
    ("fallback-lstm", "lstm.weight_ih_l0"),
    ("fallback-attention", "attention.in_proj_weight"),
    ("fallback-bare", "token"),
    ("fallback-borrowed", "inner.weight"),
]


@pytest.mark.parametrize(("name", "parameter"), NAMED)
def test_warn_names_what_is_left_out_with_its_share(name: str, parameter: str) -> None:
    with pytest.warns(UserWarning, match=r"Recorder: .*% of the trainable parameters are not captured"):
        result = run(BY_NAME[name], uncaptured="warn")
    sizes = {n: p.numel() for n, p in result.model.named_parameters()}
    coverage = result.recorder.coverage
    assert parameter in coverage.uncaptured
    assert f"{sizes[parameter] / sum(sizes.values()):.1%}" in coverage.uncaptured[parameter]
    missing = sum(sizes[n] for n in coverage.uncaptured)
    assert coverage.share == pytest.approx(1 - missing / sum(sizes.values()))


def test_signals_leave_out_what_is_not_captured() -> None:
    with pytest.warns(UserWarning, match="token"):
        check(run(BY_NAME["fallback-bare"], uncaptured="warn", speed=lambda model: {model.token: 0.0}))


@pytest.mark.parametrize(("name", "parameter"), NAMED)
def test_raise_raises_in_the_first_step(name: str, parameter: str) -> None:
    with pytest.raises(CaptureError, match=f"Recorder: .*{parameter}.*register_layer|Recorder: .*{parameter}.*Register"):
        run(BY_NAME[name], uncaptured="raise")


def test_functional_use_beside_the_module_is_proved_wrong() -> None:
    with pytest.warns(UserWarning, match="add up to something else"):
        result = run(BY_NAME["fallback-borrowed"], uncaptured="warn")
    assert set(result.recorder.coverage.uncaptured) == {"inner.weight", "inner.bias"}


@pytest.mark.parametrize(
    ("model", "setting_shape", "words", "parameter", "rows"),
    [
        (PositionTable, (5,), True, "place.weight", 5),
        (PositionTable, (4,), True, "place.weight", 8),
        (TimeFirst, (5, 4), False, "inner.weight", 5),
        (TimeFirst, (5, 4), False, "inner.weight", 4),
        (lambda: TimeFirst(flat=True), (5, 4), False, "inner.weight", 5),
        (lambda: TimeFirst(flat=True), (3, 4), False, "inner.weight", 6),
    ],
    ids=["positions", "positions-half", "time-first", "time-first-other", "time-first-flat", "time-first-flat-other"],
)
def test_layers_not_led_by_rows_are_found_though_the_sizes_agree(
    model: Callable[[], nn.Module], setting_shape: tuple[int, ...], words: bool, parameter: str, rows: int
) -> None:
    setting = Setting("probe", model, setting_shape, words=words, each_token=words)
    with pytest.warns(UserWarning, match=parameter):
        result = run(setting, batch_size=rows, steps=1, uncaptured="warn")
    assert parameter in result.recorder.coverage.uncaptured
    assert "head.weight" not in result.recorder.coverage.uncaptured
    left_out = {p: 0.0 for n, p in result.model.named_parameters() if n in result.recorder.coverage.uncaptured}
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(run(setting, batch_size=rows, uncaptured="warn", speed=lambda m: _same_names(m, result.model, left_out)))
    check(run(setting, batch_size=rows, uncaptured="fallback"))


def _same_names(model: nn.Module, other: nn.Module, factors: dict[nn.Parameter, float]) -> dict[nn.Parameter, float]:
    names = {n for n, p in other.named_parameters() if p in factors}
    return {p: 0.0 for n, p in model.named_parameters() if n in names}


def test_without_a_loss_the_missing_row_check_is_noted() -> None:
    model, x, y = mlp(), torch.randn(4, 4), torch.randint(3, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, 4, "self", on_error="raise")
    with recorder:
        with recorder.batch(torch.arange(4)):
            cross_entropy(model, (x, y)).backward()
        optimizer.step()
    assert any("order of rows" in note for note in recorder.coverage.notes)


def test_rows_that_do_not_fit_the_batch_are_refused() -> None:
    model, x, y = mlp(), torch.randn(4, 4), torch.randint(3, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, 9, "self", cross_entropy, on_error="raise") as recorder:
        with pytest.raises(RowsError, match=r"Recorder: no layer's gradients could be told apart by the batch's 3 rows"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with recorder.batch(torch.arange(3), (x, y)):
                    cross_entropy(model, (x, y)).backward()


@pytest.mark.parametrize("rows", [[-1, 0], [0, 9], [[0, 1]], [0.5, 1.0], []])
def test_wrong_rows_are_refused(rows: Any) -> None:
    model = mlp()
    recorder = Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), 9, "self", on_error="raise")
    with recorder, pytest.raises(RowsError, match="Recorder: row"):
        recorder.start_batch(torch.tensor(rows))


def test_recording_changes_no_weight() -> None:
    def trained(recorded: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 3))
        x, y = torch.randn(8, 1, 6, 6), torch.randint(3, (8,))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        recorder = Recorder(model, optimizer, 8, {"val": (x, y), "self": "self"}, cross_entropy, refresh_every=1, on_error="raise")
        context: Any = recorder if recorded else contextlib.nullcontext()
        with context:
            for rows in torch.arange(8).repeat(3).split(4):
                with recorder.batch(rows, (x[rows], y[rows])) if recorded else contextlib.nullcontext():
                    loss = cross_entropy(model, (x[rows], y[rows]))
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return copy.deepcopy(model.state_dict()), torch.rand(3)

    (plain, after), (watched, after_watched) = trained(False), trained(True)
    assert all(torch.equal(plain[k], watched[k]) for k in plain)
    assert torch.equal(after, after_watched)
