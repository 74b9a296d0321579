"""Convolutions' gradients from the image, against those from windows that are cut out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture import Outer
from ine_callback.capture.layers.convolution import convolution
from ine_callback.capture.per_sample_gradients import Windows, outer

EXACT = {"rtol": 1e-10, "atol": 1e-12}
LAYERS = {
    "plain": (nn.Conv2d(3, 4, 3), (3, 7, 6)),
    "strided, dilated, padded": (nn.Conv2d(2, 4, (2, 3), stride=(2, 1), dilation=(1, 2), padding=(1, 2)), (2, 7, 9)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "one dimension": (nn.Conv1d(3, 5, 4, stride=3), (3, 17)),
    "three dimensions": (nn.Conv3d(2, 3, 2), (2, 4, 3, 4)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def pair(request: pytest.FixtureRequest) -> tuple[Windows, Outer]:
    """A convolution's per-sample gradients with its bias, and the same with all windows formed."""
    layer, shape = request.param
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(5, *shape, generator=draw, dtype=torch.float64)
    output_grads = torch.randn(5, *layer.double()(a).shape[1:], generator=draw, dtype=torch.float64)
    grad_samples = convolution(layer, a, output_grads, 5)
    lazy = grad_samples["weight"].with_bias()
    assert isinstance(lazy, Windows)
    return lazy, Outer(lazy.formed(), lazy.output_grads)


def test_all_methods_agree_with_windows_that_are_cut_out(pair: tuple[Windows, Outer]) -> None:
    lazy, formed = pair
    groups, out, inputs = formed.layout
    assert lazy.layout == formed.layout and lazy.rows == formed.rows and lazy.units == formed.units

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    signs = draw(3, groups * out)
    for queries in (1, 2, 9):
        u = draw(queries, *formed.layout)
        torch.testing.assert_close(lazy.parts(u, signs), formed.parts(u, signs), **EXACT)
    torch.testing.assert_close(lazy.unit_energies(signs), formed.unit_energies(signs), **EXACT)
    torch.testing.assert_close(lazy.squared_norms(), formed.squared_norms(), **EXACT)
    torch.testing.assert_close(lazy.total(), formed.total(), **EXACT)
    weights = draw(2, *formed.layout)
    torch.testing.assert_close(lazy.norms(weights), formed.norms(weights), **EXACT)
    left, right = draw(groups, out, 2), draw(groups, inputs, 3)
    rotated = lazy.rotated(left, right), formed.rotated(left, right)
    torch.testing.assert_close(rotated[0].gradient(slice(1, 4)), rotated[1].gradient(slice(1, 4)), **EXACT)
    torch.testing.assert_close(lazy.compressed(right).g.mT, formed.gradient(slice(None)) @ right, **EXACT)
    torch.testing.assert_close(
        lazy.transposed().gradient(slice(0, 5)), formed.transposed().gradient(slice(0, 5)), **EXACT
    )
    rows = torch.tensor([3, 0])
    assert torch.equal(lazy.formed(rows), formed.activations[rows])


def test_the_windows_are_those_of_unfold() -> None:
    layer, shape = LAYERS["strided, dilated, padded"]
    assert isinstance(layer, nn.Conv2d)
    a = torch.randn(5, *shape, dtype=torch.float64)
    grad_sample = convolution(layer, a, layer.double()(a), 5)["weight"]
    assert isinstance(grad_sample, Windows)
    options = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    unfolded = F.unfold(a, layer.kernel_size, **options)
    torch.testing.assert_close(grad_sample.formed()[:, 0], unfolded.transpose(1, 2), **EXACT)


@pytest.mark.parametrize("full", [(True, True), (False, False)])
def test_covariances_of_sampled_positions_average_to_those_of_all(
    pair: tuple[Windows, Outer], full: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the phases of one interval every position is taken once."""
    formed = pair[1]
    positions = formed.output_grads.shape[2]
    truth = formed.covariances(full)
    monkeypatch.setattr(outer, "MAX_POSITIONS", formed.rows * positions // 3)
    interval = -(-positions * formed.rows // outer.MAX_POSITIONS)
    for grad_sample in pair:
        phases = [(k + 0.5) / interval for k in range(interval)]
        found = [grad_sample.covariances(full, phase) for phase in phases]
        sizes = [len(range(k, positions, interval)) for k in range(interval)]
        for side in range(2):
            mean = sum(one[side] * size for one, size in zip(found, sizes, strict=True)) / positions
            torch.testing.assert_close(mean, truth[side], **EXACT)
