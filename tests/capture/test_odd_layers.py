"""An unusual layer is recorded exactly, or left out with its name and reason; the others are recorded in any case."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import Recorder
from ine_callback.capture import BlockTable, Capture, Lookup, Vector, register_layer
from ine_callback.capture.errors import LayerError
from tests.helpers.failing_layer import Failing, around
from tests.helpers.oracle import Setting, check, cross_entropy, run


class LayerNorm2d(nn.LayerNorm):
    """As in torchvision and timm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OwnLayerNorm2d(nn.Module):
    """As in Segment Anything and the first ConvNeXt: no subclass of torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).square().mean(1, keepdim=True)
        x = (x - mean) / (spread + self.eps).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Rolled(nn.Linear):
    """Moves the rows, and what is around it moves them back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, 0))


class CallsRolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Rolled(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x).roll(-1, 0))


class Scaled(nn.Linear):
    """A parameter without dimensions beside the weight."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Temperature(nn.Module):
    """A registered layer with a parameter without dimensions, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.nothing = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.nothing.sum()


@register_layer(Temperature)
def _temperature(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, Tensor]:
    return {
        "scale": (activations * output_grads).flatten(1).sum(1),
        "nothing": output_grads.new_zeros(rows, 0, 3),
    }


class WeightProperty(nn.Linear):
    """Reading the weight computes and counts."""

    reads = 0

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        nn.init.normal_(self._parameters["weight"])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        WeightProperty.reads += 1
        return self._parameters["weight"] * 2.0


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, dtype=torch.complex128)

    def double(self) -> nn.Module:  # which would make it real
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(torch.complex128)).abs()


class Functional(nn.Module):
    """A layer called with weights made of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        fast = {name: p * 1.5 for name, p in self.inner.named_parameters()}
        return torch.tanh(torch.func.functional_call(self.inner, fast, (x,)))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x.to_sparse()))


class WritesIntoGradients(Failing):
    pass


@register_layer(WritesIntoGradients)
def _writes(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, Tensor]:
    return {"factor": activations.mul_(output_grads) + output_grads.zero_()}


def image(layer: Callable[[], nn.Module], width: int) -> Setting:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, width, 3), layer(), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 3))

    return Setting("image", model, (1, 6, 6))


EXACT = {
    "LayerNorm2d": image(lambda: LayerNorm2d(8), 8),
    "LayerNorm2d, as wide as the image": image(lambda: LayerNorm2d(4), 4),
    "LayerNorm2d of its own": image(lambda: OwnLayerNorm2d(8), 8),
    "LayerNorm2d of its own, as wide as the image": image(lambda: OwnLayerNorm2d(4), 4),
    "no dimension, and an empty parameter": Setting("scalar", around(Temperature)),
    "sparse input": Setting("sparse", around(Sparse)),
    "a layer with a scale beside": Setting("scaled", around(lambda: Scaled(4, 4))),
    "a function that writes into what it gets": Setting("writes", around(WritesIntoGradients)),
}


@pytest.mark.parametrize("setting", EXACT.values(), ids=EXACT)
def test_unusual_layers_are_recorded_exactly(setting: Setting) -> None:
    check(run(setting))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out with the curvature either
        assert run(setting, discount=True).recorder.coverage.share == 1.0


ODD = {
    "fails": (around(Failing), ["2.factor"], "recording it failed with ZeroDivisionError: mine"),
    "mixes rows": (around(CallsRolled), ["2.layer.weight", "2.layer.bias"], "other gradients than autograd"),
    "property": (around(lambda: WeightProperty(4, 4)), ["2.weight"], "a property of WeightProperty"),
    "functional_call": (around(Functional), ["2.inner.weight", "2.inner.bias"], "functional_call"),
}


@pytest.mark.parametrize(("model", "left_out", "why"), ODD.values(), ids=ODD)
def test_a_layer_that_does_not_fit_is_left_out_with_its_reason_and_the_others_stay_exact(
    model: Callable[[], nn.Module], left_out: list[str], why: str
) -> None:
    def without(module: nn.Module) -> dict[nn.Parameter, float]:
        return {p: 0.0 for name, p in module.named_parameters() if name in left_out}

    with pytest.warns(UserWarning, match=why):
        result = run(Setting("odd", model), uncaptured="warn", speed=without)
    assert sorted(result.recorder.coverage.uncaptured) == sorted(left_out)
    check(result)
    if left_out != ["2.factor"]:  # its function would fail again, but the fallback does not call it
        check(run(Setting("odd", model), uncaptured="fallback"))


def test_the_capture_never_reads_a_computed_weight() -> None:
    model, x, y = around(lambda: WeightProperty(4, 4))(), torch.randn(4, 4), torch.randint(3, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, 4, "self", on_error="raise")  # no loss: no pass of ours
    before = WeightProperty.reads
    with recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            with recorder.batch(torch.arange(4)):
                cross_entropy(model, (x, y)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert WeightProperty.reads - before == 3


def test_complex_layers_are_left_out() -> None:
    def model() -> nn.Module:
        return nn.Sequential(Complex(), nn.Linear(4, 3))

    batch = torch.randn(4, 4).double(), torch.randint(3, (4,))
    module = model()
    module[1].double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    recorder = Recorder(module, optimizer, 4, {"val": batch, "own": "self"}, cross_entropy, on_error="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with recorder:
            for _ in range(2):
                with recorder.batch(torch.arange(4), batch):
                    cross_entropy(module, batch).backward()
                optimizer.step()
    assert "complex128" in recorder.coverage.uncaptured["0.inner.weight"]
    assert recorder.report().scores.mu.dtype.kind == "f"


def test_tied_weights_with_grad_samples_of_different_kinds_are_refused() -> None:
    embed, head = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)
    head.weight = embed.weight
    table = BlockTable(nn.Sequential(embed, head))
    table.sort(embed, {"weight": Lookup(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, 4), 3)})
    with pytest.raises(LayerError, match=r"Vector of \(12,\) for '0.weight'.*gradients of \(1, 3, 4\)"):
        table.sort(head, {"weight": Vector(torch.zeros(2, 12))})


def test_sequences_of_one_position_among_longer_ones_are_recorded() -> None:
    """Factors and whole gradients do not go into one place of the reservoir."""
    for lengths in ([3, 3, 1, 3], [1, 1, 3, 1]):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        x, y = torch.randn(80, 3, 4), torch.randint(3, (80, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = Recorder(model, optimizer, 80, {"val": (x, y)}, cross_entropy, on_error="raise", curvature_every=1)
        with recorder:
            for length in lengths:
                batch = x[:, :length], y[:, :length]
                with recorder.batch(torch.arange(80), batch):
                    F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert recorder.steps == 4


def test_inference_tensors_and_transforms_cause_no_error_in_the_users_pass() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(4, 4)
    found: list[object] = []
    capture = Capture(layer, lambda module, grad_samples: found.append(grad_samples), pytest.fail)
    capture.attach()
    capture.start_batch(4)
    layer(x).sum().backward()
    assert len(found) == 1
    torch.func.grad(lambda bias: torch.func.functional_call(layer, {"bias": bias}, (torch.ones(4, 4),)).sum())(
        layer.bias.detach()
    )
    assert "torch.func" in capture.dropped[""]
