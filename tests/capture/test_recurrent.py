"""LSTM, GRU, RNN and their cells: every row's gradients against a pass of its own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ine_callback import Recorder
from ine_callback.capture import Capture, GradSample
from ine_callback.capture.layers.recurrent import recurrent
from tests.helpers.oracle import Keep, cross_entropy
from tests.helpers.vision import needs_saved

ROWS, STEPS, INPUTS, WIDTH = 4, 5, 3, 4
EXACT = {"rtol": 1e-9, "atol": 1e-11}
LENGTHS = (3, 5, 1, 4)
KINDS = [nn.LSTM, nn.GRU, nn.RNN]
CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]


@dataclass
class Form:
    """How a layer is made and called, and which of its outputs the loss uses."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    states: bool = False
    used: str = "yhc"


STACKED = {"num_layers": 2, "bidirectional": True}
FORMS = [
    Form("time first"),
    Form("batch first", {"batch_first": True}),
    Form("outputs alone", used="y"),
    Form("last state alone", used="h"),
    Form("last cell state alone", used="c"),
    Form("output and cell state", used="yc"),
    Form("no bias", {"bias": False}),
    Form("two layers", {"num_layers": 2}),
    Form("both directions", {"bidirectional": True, "batch_first": True}),
    Form("both directions, last state alone", {"bidirectional": True}, used="h"),
    Form("two layers, both directions, given states", STACKED, states=True),
    Form("two layers, both directions, no bias", {**STACKED, "bias": False, "batch_first": True}),
    Form("given states", states=True),
    Form("packed", packed=True),
    Form("packed, last state alone", packed=True, used="h"),
    Form("packed, two layers, both directions, given states", {**STACKED, "batch_first": True}, True, True),
]


class Series(nn.Module):
    """A recurrent layer, and a loss for each row of what it returns."""

    def __init__(self, kind: type[nn.RNNBase], form: Form, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> None:
        super().__init__()
        self.form, self.lengths = form, torch.tensor(lengths)
        self.layer = kind(INPUTS, WIDTH, **form.options, **options)
        for p in self.layer.parameters():
            nn.init.normal_(p, std=0.6)
        places = self.layer.num_layers * (1 + self.layer.bidirectional)
        self.given = {name: torch.randn(places, ROWS, WIDTH) for name in "hc"}
        self.weights = {"y": torch.randn(ROWS, STEPS, 2 * WIDTH)}
        self.weights |= {name: torch.randn(places, ROWS, WIDTH) for name in "hc"}

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        first = self.layer.batch_first
        x = x[rows] if first else x[rows].transpose(0, 1)
        if self.form.packed:
            x = pack_padded_sequence(x, self.lengths[rows], batch_first=first, enforce_sorted=False)
        h, c = (self.given[name][:, rows] for name in "hc")
        states = None if not self.form.states else (h, c) if isinstance(self.layer, nn.LSTM) else h
        y, last = self.layer(x, states)
        if self.form.packed:
            y = pad_packed_sequence(y, batch_first=first, total_length=STEPS)[0]
        y = y if first else y.transpose(0, 1)
        found = {"y": y, **dict(zip("hc", last if isinstance(last, tuple) else (last,), strict=False))}
        losses = [torch.zeros(())]
        for name in self.form.used:
            if name in found:
                weight = self.weights[name][rows] if name == "y" else self.weights[name][:, rows]
                losses.append((found[name].square() * weight[..., : found[name].shape[-1]]).sum())
        return torch.stack([each.to(x.data.dtype) for each in losses]).sum()


class Loop(nn.Module):
    """A cell at every step, from states of zero or not; all states are in the loss."""

    def __init__(self, kind: type[nn.RNNCellBase], bias: bool, states: bool) -> None:
        super().__init__()
        self.layer, self.states = kind(INPUTS, WIDTH, bias=bias), states
        self.given, self.weights = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        h, loss = self.given[rows], torch.zeros(())
        states: Any = None if not self.states else (h, h.cos()) if isinstance(self.layer, nn.LSTMCell) else h
        for each in x[rows].unbind(1):
            states = self.layer(each, states)
            for state in states if isinstance(states, tuple) else (states,):
                loss = loss + (state.square() * self.weights[rows]).sum()
        return loss


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def captured(module: nn.Module, loss: Callable[[], Tensor], rows: int = ROWS) -> tuple[dict[str, Tensor], Capture]:
    """The rows' gradients of all of a module's parameters, summed over its calls; and the hooks, already removed."""
    found: dict[str, Tensor] = {}
    names = {child: name for name, child in module.named_modules()}

    def receive(child: nn.Module, grad_samples: dict[str, GradSample]) -> None:
        for name, each in grad_samples.items():
            shape = (rows, *child.get_parameter(name).shape)
            full = f"{names[child]}.{name}".removeprefix(".")
            found[full] = found.get(full, 0) + each.wide().gradient(slice(None)).reshape(shape)

    def fail(error: Exception) -> None:
        raise error

    capture = Capture(module, receive, fail)
    capture.attach()
    capture.start_batch(rows)
    loss().backward()
    capture.detach()
    return found, capture


def assert_as_alone(module: nn.Module, x: Tensor) -> None:
    every = torch.arange(ROWS)
    found, capture = captured(module, lambda: module(x, every))
    assert not capture.dropped
    parameters = dict(module.named_parameters())
    for row in every:
        alone = torch.autograd.grad(module(x, row[None]), list(parameters.values()), allow_unused=True)
        for (name, p), expected in zip(parameters.items(), alone, strict=True):
            expected = torch.zeros_like(p) if expected is None else expected
            torch.testing.assert_close(found[name][row], expected, msg=lambda m, name=name: f"{name}: {m}", **EXACT)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_gradients_are_those_of_a_pass_of_their_own(kind: type[nn.RNNBase], form: Form) -> None:
    if form.used == "c" and kind is not nn.LSTM:
        pytest.skip("only an LSTM has a cell state")
    assert_as_alone(Series(kind, form), torch.randn(ROWS, STEPS, INPUTS))


@pytest.mark.parametrize("packed", [False, True])
def test_an_rnn_with_relu(packed: bool) -> None:
    assert_as_alone(Series(nn.RNN, Form("", STACKED, packed), nonlinearity="relu"), torch.randn(ROWS, STEPS, INPUTS))


@given(lengths=st.lists(st.integers(1, STEPS), min_size=ROWS, max_size=ROWS).map(tuple), kind=st.sampled_from(KINDS))
@settings(max_examples=15, deadline=None)
def test_packed_sequences_of_any_lengths(lengths: tuple[int, ...], kind: type[nn.RNNBase]) -> None:
    assert_as_alone(Series(kind, Form("", {"bidirectional": True}, True), lengths), torch.randn(ROWS, STEPS, INPUTS))


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_a_loop(kind: type[nn.RNNCellBase], bias: bool, states: bool) -> None:
    assert_as_alone(Loop(kind, bias, states), torch.randn(ROWS, STEPS, INPUTS))


def test_a_fused_lstm_cell_gives_gradients_of_both_states() -> None:
    """As on a GPU, where the gradient of c does not hold what comes to it through h."""
    cell, x, h, c = nn.LSTMCell(INPUTS, WIDTH), *(torch.randn(ROWS, k) for k in (INPUTS, WIDTH, WIDTH))
    grads = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    with torch.no_grad():
        found = recurrent(cell, {"x": x, "h": h, "c": c}, dict(zip("hc", grads, strict=True)), ROWS)
    names, parameters = zip(*cell.named_parameters(), strict=True)
    for name, expected in zip(names, torch.autograd.grad(cell(x, (h, c)), parameters, grads), strict=True):
        torch.testing.assert_close(found[name].total().reshape(expected.shape), expected, **EXACT)


def test_rows_of_several_sequences() -> None:
    """A batch of texts, each of three sentences: [b * 3, T, I]."""
    layer, x, weight = nn.GRU(INPUTS, WIDTH, batch_first=True), torch.randn(ROWS * 3, STEPS, INPUTS), torch.randn(WIDTH)
    found, _ = captured(layer, lambda: (layer(x)[0] @ weight).tanh().sum())
    for row, own in enumerate(x.split(3)):
        alone = torch.autograd.grad((layer(own)[0] @ weight).tanh().sum(), layer.weight_hh_l0)[0]
        torch.testing.assert_close(found["weight_hh_l0"][row], alone, **EXACT)


def test_states_that_overflow_behind_the_end_of_a_sequence_do_no_harm() -> None:
    layer, x = nn.RNN(1, 1, nonlinearity="relu", batch_first=True, bias=False), torch.zeros(2, 150, 1)
    for p in layer.parameters():
        nn.init.constant_(p, 1e3)  # to the power of 150 it is infinite
    x[1, :2] = 1.0
    packed = pack_padded_sequence(x, torch.tensor([150, 2]), batch_first=True)
    found, _ = captured(layer, lambda: layer(packed)[1].sum(), rows=2)
    torch.testing.assert_close(found["weight_hh_l0"][1], torch.tensor([[1e3]]))


class Own(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        return super().forward(2 * x, hx)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (lambda: nn.GRU(3, 4, num_layers=2, dropout=0.1), (5, 4, 3), "dropout between its layers"),
        (lambda: nn.LSTM(3, 4, proj_size=2), (5, 4, 3), "proj_size"),
        (lambda: Own(3, 4), (5, 4, 3), "Own has a forward of its own"),
        (lambda: nn.GRU(3, 4), (4, 3), "no dimension of rows"),
        (lambda: nn.GRU(3, 4), (5, 3, 3), "3 sequences are not those of the batch's 4 rows"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0"), (5, 4, 3), "is computed"),
    ],
)
def test_what_cannot_be_run_again_is_named(layer: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    module = layer()
    found, capture = captured(module, lambda: module(torch.randn(shape))[0].sum())
    assert reason in capture.dropped[""]
    assert not found


def test_without_training_there_is_no_dropout_between_layers() -> None:
    module = nn.LSTM(INPUTS, WIDTH, num_layers=2, dropout=0.5).eval()
    found, capture = captured(module, lambda: module(torch.randn(STEPS, ROWS, INPUTS))[0].sum())
    assert not capture.dropped
    assert len(found) == 8


def test_the_graph_is_freed_with_the_batch() -> None:
    """Hooks on several outputs refer to the graph that holds them; no garbage collection is needed."""

    class Token:
        pass

    layer, alive = nn.LSTM(INPUTS, WIDTH), list[weakref.ref[Token]]()

    def loss() -> Tensor:
        y, token = layer(torch.randn(STEPS, ROWS, INPUTS))[0], Token()
        y.grad_fn.metadata["token"] = token
        alive.append(weakref.ref(token))
        return y.sum()

    gc.disable()
    try:
        captured(layer, loss)
        assert alive[0]() is None
    finally:
        gc.enable()


class Last(nn.Module):
    """Classes from the last output of a recurrent layer."""

    def __init__(self, rnn: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def dropping(kind: type[nn.RNNBase]) -> nn.Module:
    return Last(kind(4, 3, num_layers=2, dropout=0.5, batch_first=True), 3)


def recorded(module: nn.Module, **options: Any) -> Recorder:
    """Trained in float32, where a CPU computes an LSTM by one fused operation."""
    module, x, y = module.float(), torch.randn(8, 5, 4, dtype=torch.float32), torch.randint(3, (8,))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    options = {"queries": {"val": (x, y)}, "loss": cross_entropy, "on_error": "raise", **options}
    recorder = Recorder(module, optimizer, rows=8, **options)
    with recorder:
        for rows in torch.arange(8).split(4):
            with recorder.batch(rows, (x[rows], y[rows])):
                value = cross_entropy(module, (x[rows], y[rows]))
                recorder.see(value)
                value.backward()
            optimizer.step()
            optimizer.zero_grad()
    return recorder


class Again(nn.LSTM):
    """The same numbers, by a forward of its own."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        return super().forward(x, hx)


def test_signals_are_those_of_the_fallback() -> None:
    found = []
    for kind in (nn.LSTM, Again):
        torch.manual_seed(0)
        model, keep = Last(kind(4, 3, num_layers=2, bidirectional=True, batch_first=True), 6), Keep()
        recorder = recorded(model, methods=[keep], discount=False, uncaptured="fallback")
        assert bool(recorder.capture.dropped) == (kind is Again)
        found.append(torch.cat([signals for _, signals, _ in keep.steps]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6 * float(found[0].abs().max()))


@needs_saved
def test_dropout_between_layers_is_read_where_the_products_are_seen() -> None:
    """A GRU on a CPU is no fused kernel: its matrix products are read as those of bare parameters."""
    assert not recorded(dropping(nn.GRU)).coverage.uncaptured


@needs_saved
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True, "num_layers": 3}])
def test_masks_of_dropout_between_layers_of_a_fused_kernel_are_read(options: dict[str, Any]) -> None:
    """A CPU has one operation for each layer in float32, and torch's dropout between: rows among their mates."""
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, **{"num_layers": 2, "dropout": 0.5, **options}).float()
    x, turned = torch.randn(5, 4, 3, dtype=torch.float32), bool(options.get("batch_first"))

    def rows_last(y: Tensor) -> Tensor:
        return y.transpose(0, 1) if turned else y

    weights = torch.randn(5, 4, 4 * (1 + module.bidirectional), dtype=torch.float32)
    given, state = rows_last(x), torch.get_rng_state()
    found, capture = captured(
        module, lambda: (module(given)[0] * (weights.transpose(0, 1) if turned else weights)).sum()
    )
    assert not capture.dropped
    for row in range(4):
        torch.set_rng_state(state)
        own = rows_last(module(given)[0])[:, row] * weights[:, row]
        expected = torch.autograd.grad(own.sum(), list(module.parameters()))
        for (name, _), grad in zip(module.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name][row].view_as(grad), grad, rtol=1e-4, atol=1e-5)


@needs_saved
def test_dropout_between_layers_of_a_fused_kernel_leaves_nothing_out() -> None:
    assert not recorded(dropping(nn.LSTM)).coverage.uncaptured


def test_dropout_between_layers_of_packed_sequences_is_the_reason_in_the_report() -> None:
    module = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    packed = pack_padded_sequence(torch.randn(5, 4, 3), torch.tensor([5, 4, 2, 1]))
    found, capture = captured(module, lambda: module(packed)[0].data.sum())
    assert "dropout between its layers" in capture.dropped[""] and not found
