"""Every layer function against a loop over rows: one forward and one backward pass of its own for each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ine_callback.capture import Capture, GradSample, Lookup, Vector, register_layer
from ine_callback.capture.layers import RowMismatch, by_row

ROWS = 4
EXACT = {"rtol": 1e-10, "atol": 1e-11}


@dataclass
class Case:
    """A layer, its input for ``ROWS`` rows, and how often a row stands in the leading dimension (flattened tokens)."""

    name: str
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    entries: int = 0  # of an embedding: inputs are then integers
    per_row: int = 1
    frozen: tuple[str, ...] = ()
    prepare: Callable[[nn.Module], object] = field(default=lambda layer: None)

    def make(self) -> tuple[nn.Module, Tensor]:
        layer = self.layer().double()
        for p in layer.parameters():
            nn.init.normal_(p)
        for name in self.frozen:
            layer.get_parameter(name).requires_grad_(False)
        self.prepare(layer)
        x = torch.randint(self.entries, self.shape) if self.entries else torch.randn(self.shape, dtype=torch.float64)
        return layer, x


def _eval_with_statistics(layer: nn.Module) -> None:
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    layer.eval()


def _linear() -> list[Case]:
    cases = [
        Case(f"linear-{len(shape)}d-bias={bias}", lambda b=bias: nn.Linear(5, 3, bias=b), shape)
        for shape in [(ROWS, 5), (ROWS, 6, 5), (ROWS, 2, 3, 5)]
        for bias in (True, False)
    ]
    cases.append(Case("linear-flattened-tokens", lambda: nn.Linear(5, 3), (ROWS * 6, 5), per_row=6))
    cases += [
        Case(f"linear-frozen-{k}", lambda: nn.Linear(5, 3), (ROWS, 2, 5), frozen=(k,)) for k in ("weight", "bias")
    ]
    return cases


_SPACE = {1: (9,), 2: (8, 7), 3: (5, 6, 4)}
_KERNEL = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}
_CONV = {
    "plain": {},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2},
    "padding": {"padding": 1},
    "same": {"padding": "same"},
    "same-dilated": {"padding": "same", "dilation": 2, "groups": 2},
    "valid": {"padding": "valid"},
    "no-bias": {"bias": False, "padding": 1, "stride": 3},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": "same", "padding_mode": "circular"},
    "all": {"padding": 2, "padding_mode": "circular", "stride": 2, "dilation": 2, "groups": 2},
}
_TRANSPOSED = {
    "plain": {},
    "groups": {"groups": 2},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "dilation": {"dilation": 2},
    "output-padding": {"stride": 2, "output_padding": 1},
    "no-bias": {"bias": False, "stride": 2},
    "all": {"stride": 3, "padding": 1, "output_padding": 2, "groups": 2, "dilation": 2},
}


def _convolutions() -> list[Case]:
    cases = []
    for dim, kind in {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.items():
        for name, options in _CONV.items():
            settings: dict[str, Any] = {"in_channels": 4, "out_channels": 6, "kernel_size": _KERNEL[dim], **options}
            cases.append(Case(f"conv{dim}d-{name}", lambda k=kind, s=settings: k(**s), (ROWS, 4, *_SPACE[dim])))
    for dim, kind in {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}.items():
        for name, options in _TRANSPOSED.items():
            settings = {"in_channels": 4, "out_channels": 6, "kernel_size": _KERNEL[dim], **options}
            cases.append(Case(f"transposed{dim}d-{name}", lambda k=kind, s=settings: k(**s), (ROWS, 4, *_SPACE[dim])))
    for frozen in ("weight", "bias"):
        cases.append(Case(f"conv2d-frozen-{frozen}", lambda: nn.Conv2d(4, 6, 3), (ROWS, 4, 5, 5), frozen=(frozen,)))
    return cases


def _embeddings() -> list[Case]:
    return [
        Case("embedding-1d", lambda: nn.Embedding(6, 3), (ROWS,), entries=6),
        Case("embedding-2d", lambda: nn.Embedding(6, 3), (ROWS, 5), entries=6),
        Case("embedding-3d", lambda: nn.Embedding(6, 3), (ROWS, 2, 3), entries=6),
        Case("embedding-padding", lambda: nn.Embedding(4, 3, padding_idx=1), (ROWS, 5), entries=4),
        Case("embedding-negative-padding", lambda: nn.Embedding(4, 3, padding_idx=-1), (ROWS, 5), entries=4),
        Case("embedding-sparse", lambda: nn.Embedding(6, 3, sparse=True), (ROWS, 5), entries=6),
    ]


def _norms() -> list[Case]:
    cases = [
        Case("layernorm-2d", lambda: nn.LayerNorm(5), (ROWS, 5)),
        Case("layernorm-3d", lambda: nn.LayerNorm(5), (ROWS, 3, 5)),
        Case("layernorm-multi", lambda: nn.LayerNorm((3, 5)), (ROWS, 2, 3, 5)),
        Case("layernorm-whole-row", lambda: nn.LayerNorm((3, 5)), (ROWS, 3, 5)),
        Case("layernorm-flattened", lambda: nn.LayerNorm(5), (ROWS * 6, 5), per_row=6),
        Case("layernorm-no-bias", lambda: nn.LayerNorm(5, bias=False, eps=0.1), (ROWS, 3, 5)),
        Case("layernorm-frozen", lambda: nn.LayerNorm(5), (ROWS, 3, 5), frozen=("weight",)),
        Case("rmsnorm", lambda: nn.RMSNorm(5), (ROWS, 3, 5)),
        Case("rmsnorm-multi", lambda: nn.RMSNorm((3, 5), eps=0.1), (ROWS, 2, 3, 5)),
        Case("groupnorm-2d", lambda: nn.GroupNorm(2, 6), (ROWS, 6)),
        Case("groupnorm-4d", lambda: nn.GroupNorm(3, 6, eps=0.1), (ROWS, 6, 3, 2)),
        Case("groupnorm-frozen", lambda: nn.GroupNorm(3, 6), (ROWS, 6, 4), frozen=("bias",)),
        Case("instancenorm1d", lambda: nn.InstanceNorm1d(3, affine=True), (ROWS, 3, 7)),
        Case("instancenorm2d", lambda: nn.InstanceNorm2d(3, affine=True, eps=0.1), (ROWS, 3, 4, 5)),
        Case("instancenorm3d", lambda: nn.InstanceNorm3d(3, affine=True), (ROWS, 3, 2, 3, 2)),
        Case("instancenorm-tracked", lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (ROWS, 3, 7)),
    ]
    tracked = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    for name, layer, shape in [
        ("instancenorm-eval", lambda: tracked, (ROWS, 3, 7)),
        ("batchnorm1d-2d-eval", lambda: nn.BatchNorm1d(5), (ROWS, 5)),
        ("batchnorm1d-3d-eval", lambda: nn.BatchNorm1d(5, eps=0.1), (ROWS, 5, 3)),
        ("batchnorm2d-eval", lambda: nn.BatchNorm2d(5), (ROWS, 5, 3, 4)),
    ]:
        cases.append(Case(name, layer, shape, prepare=_eval_with_statistics))
    return cases


CASES = [*_linear(), *_convolutions(), *_embeddings(), *_norms()]


def captured(layer: nn.Module, x: Tensor, weights: Tensor, rows: int = ROWS, **call: Any) -> dict[str, GradSample]:
    """Per-sample gradients of one call of the layer, by the real hooks; also leaves ``grad`` on the parameters."""
    found: dict[str, GradSample] = {}
    errors: list[Exception] = []
    capture = Capture(layer, lambda module, grad_samples: found.update(grad_samples), errors.append)
    capture.attach()
    capture.start_batch(rows)
    ((layer(**call) if call else layer(x)).square() * weights).sum().backward()
    capture.detach()
    assert not errors, errors
    assert not capture.dropped, capture.dropped
    return found


def by_loop(layer: nn.Module, x: Tensor, weights: Tensor, per_row: int = 1) -> dict[str, Tensor]:
    """The gradient of each row's own loss [b, *shape], one pass a row."""
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    out: dict[str, list[Tensor]] = {n: [] for n in parameters}
    for k in range(len(x) // per_row):
        row = slice(k * per_row, (k + 1) * per_row)
        loss = (layer(x[row]).square() * weights[row]).sum()
        for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            out[name].append(grad.to_dense() if grad.is_sparse else grad)
    return {n: torch.stack(g) for n, g in out.items()}


def check_grad_sample(grad_sample: GradSample, truth: Tensor) -> None:
    """All methods of a GradSample against materialised gradients [b, *layout]."""
    rows = len(truth)
    g = truth.reshape(rows, *grad_sample.layout)
    assert grad_sample.rows == rows
    torch.testing.assert_close(grad_sample.gradient(slice(0, rows)), g, **EXACT)
    torch.testing.assert_close(grad_sample.gradient(slice(1, 3)), g[1:3], **EXACT)
    torch.testing.assert_close(grad_sample.total(), g.sum(0), **EXACT)
    for queries in (1, 3):
        u = torch.randn(queries, *grad_sample.layout, dtype=g.dtype)
        expected = torch.stack([torch.stack([(g[i] * u[q]).sum() for q in range(queries)]) for i in range(rows)])
        torch.testing.assert_close(grad_sample.signals(u), expected, **EXACT)
    torch.testing.assert_close(grad_sample.squared_norms(), g.flatten(1).square().sum(1), **EXACT)
    weights = torch.rand(2, *grad_sample.layout, dtype=g.dtype)
    torch.testing.assert_close(grad_sample.norms(weights), weighted_squares(g, weights), **EXACT)
    check_rotation(grad_sample, g, weights)


def weighted_squares(g: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([(weight * g.square()).flatten(1).sum(1) for weight in weights], 1)


def check_rotation(grad_sample: GradSample, g: Tensor, weights: Tensor) -> None:
    if isinstance(grad_sample, Vector):
        assert grad_sample.rotated(None, None) is grad_sample
        return
    groups, out, inputs = grad_sample.layout
    left = None if isinstance(grad_sample, Lookup) else torch.linalg.qr(torch.randn(groups, out, out, dtype=g.dtype)).Q
    right = torch.linalg.qr(torch.randn(groups, inputs, inputs, dtype=g.dtype)).Q
    rotated = (g if left is None else left.mT @ g) @ right
    torch.testing.assert_close(grad_sample.rotated(left, right).gradient(slice(0, len(g))), rotated, **EXACT)
    torch.testing.assert_close(
        grad_sample.rotated(left, right).norms(weights), weighted_squares(rotated, weights), **EXACT
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_per_sample_gradients_equal_a_loop_over_rows(case: Case) -> None:
    layer, x = case.make()
    weights = torch.randn_like(layer(x)).detach()
    expected = by_loop(layer, x, weights, case.per_row)
    grad_samples = captured(layer, x, weights)
    assert set(grad_samples) == set(expected)
    for name, grad_sample in grad_samples.items():
        check_grad_sample(grad_sample, expected[name])
        grad = layer.get_parameter(name).grad
        total = grad_sample.total().reshape(grad.shape)
        torch.testing.assert_close(total, grad.to_dense() if grad.is_sparse else grad, **EXACT)


def test_a_relative_error_of_1e_6_is_noticed() -> None:
    """The harness itself fails on wrong gradients."""
    layer, x = CASES[0].make()
    weights = torch.randn_like(layer(x)).detach()
    wrong = by_loop(layer, x, weights)["weight"] * (1 + 1e-6)
    with pytest.raises(AssertionError):
        check_grad_sample(captured(layer, x, weights)["weight"], wrong)


def test_embedding_scaled_by_frequency_divides_by_counts_of_the_batch() -> None:
    """A pass of the row alone would count only its own ids."""
    layer = nn.Embedding(5, 3, padding_idx=2, scale_grad_by_freq=True).double()
    ids = torch.tensor([[0, 0, 2, 1], [1, 2, 2, 0], [4, 4, 4, 4], [3, 0, 1, 2]])
    weights = torch.randn(4, 4, 3, dtype=torch.float64)
    expected = torch.zeros(4, 5, 3, dtype=torch.float64)
    for i in range(4):
        for p in range(4):
            entry = int(ids[i, p])
            if entry != 2:
                output_grads = 2 * layer.weight[entry].detach() * weights[i, p]
                expected[i, entry] += output_grads / int((ids == entry).sum())
    grad_sample = captured(layer, ids, weights)["weight"]
    check_grad_sample(grad_sample, expected)
    torch.testing.assert_close(grad_sample.total()[0], layer.weight.grad, **EXACT)


@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm1d(5), (ROWS, 5)), (nn.BatchNorm2d(5), (ROWS, 5, 3, 2))])
def test_batch_norm_in_training_adds_up_and_is_named_as_approximate(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = layer.double().train()
    nn.init.normal_(layer.weight)
    x = torch.randn(shape, dtype=torch.float64)
    grad_samples = captured(layer, x, torch.randn(shape, dtype=torch.float64))
    for name, grad_sample in grad_samples.items():
        torch.testing.assert_close(grad_sample.total(), layer.get_parameter(name).grad, **EXACT)
        assert grad_sample.gradient(slice(0, ROWS)).norm() > 0
    approximate = Capture(nn.Sequential(layer, nn.Linear(5, 2)), lambda *_: None, lambda _: None).approximate
    assert set(approximate) == {"0"}
    assert layer.__class__.__name__ in approximate["0"]


def test_an_input_by_keyword_is_captured() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(ROWS, 3, dtype=torch.float64)
    weights = torch.randn(ROWS, 2, dtype=torch.float64)
    expected = by_loop(layer, x, weights)
    for name, grad_sample in captured(layer, x, weights, input=x).items():
        check_grad_sample(grad_sample, expected[name])


def test_half_precision_is_widened_to_single() -> None:
    for layer in (nn.Linear(3, 3), nn.LayerNorm(3)):
        layer, x = layer.bfloat16(), torch.randn(ROWS, 3, dtype=torch.bfloat16)
        for name, grad_sample in captured(layer, x, torch.ones(ROWS, 3, dtype=torch.bfloat16)).items():
            assert grad_sample.wide().gradient(slice(0, ROWS)).dtype is torch.float32
            assert (grad_sample.wide() is grad_sample) == (
                isinstance(layer, nn.LayerNorm)
            )  # a linear layer's factors stay in bfloat16
            grad = getattr(layer, name).grad.float().flatten()  # itself rounded to 8 bits, more than once
            torch.testing.assert_close(grad_sample.wide().total().flatten(), grad, rtol=2**-5, atol=1e-6)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_registered_layer_is_captured_and_inherited() -> None:
    class Custom(Scale):
        pass

    class Child(Custom):
        pass

    @register_layer(Custom)
    def scale(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, Tensor]:
        return {"factor": (activations * output_grads).sum(1)}

    for kind in (Custom, Child):
        layer, x = kind().double(), torch.randn(ROWS, 2, 3, dtype=torch.float64)
        weights = torch.randn_like(x)
        check_grad_sample(captured(layer, x, weights)["factor"], by_loop(layer, x, weights)["factor"])


def test_registered_layer_of_wrong_shape_is_dropped_with_its_reason() -> None:
    class Wrong(Scale):
        pass

    @register_layer(Wrong)
    def wrong(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, Tensor]:
        return {"factor": activations * output_grads}

    layer, errors = Wrong(), []
    capture = Capture(layer, lambda *_: pytest.fail("wrong gradients were passed on"), errors.append)
    capture.attach()
    capture.start_batch(ROWS)
    layer(torch.randn(ROWS, 2, 3)).sum().backward()
    assert not errors
    assert "Wrong" in capture.dropped[""] and "(4, 2, 3)" in capture.dropped[""] and "(4, 3)" in capture.dropped[""]


def test_register_layer_refuses_what_is_no_module_class() -> None:
    with pytest.raises(TypeError, match=r"register_layer.*not a class of torch.nn.Module"):
        register_layer(Tensor)


@pytest.mark.parametrize("shape", [(), (5,), (ROWS + 1, 3), (2 * ROWS, 3, 3)])
def test_inputs_without_rows_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RowMismatch):
        by_row(torch.zeros(shape), ROWS)


def test_an_error_in_a_layer_function_does_not_reach_the_backward_pass() -> None:
    class Broken(Scale):
        pass

    @register_layer(Broken)
    def broken(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, Tensor]:
        raise ZeroDivisionError("mine")

    layer, errors = Broken(), []
    capture = Capture(layer, lambda *_: None, errors.append)
    capture.attach()
    capture.start_batch(ROWS)
    layer(torch.ones(ROWS, 3)).sum().backward()
    assert layer.factor.grad.tolist() == [4.0, 4.0, 4.0]
    assert not errors and capture.dropped == {"": "recording it failed with ZeroDivisionError: mine"}


def test_input_changed_in_place_after_the_layer_is_dropped() -> None:
    """With a frozen weight autograd does not keep the input, so only the capture can notice."""
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    capture = Capture(layer, lambda *_: pytest.fail("a stale input was used"), pytest.fail)
    capture.attach()
    capture.start_batch(ROWS)
    x = torch.randn(ROWS, 3)
    out = layer(x)
    x.add_(1.0)
    out.sum().backward()
    assert "changed in place" in capture.dropped[""]
