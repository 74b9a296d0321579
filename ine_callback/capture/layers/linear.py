"""Linear layers: a row's gradient is the sum of outer products of its output gradients and activations."""

from __future__ import annotations

from torch import Tensor, nn

from ine_callback.capture.layers.registry import by_row, register_by_name, register_layer, takes_bfloat16
from ine_callback.capture.per_sample_gradients import GradSample, Outer, Vector, widened


@register_layer(nn.Linear)
@takes_bfloat16
def linear(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Any leading dimensions: all between the row and the features are positions."""
    activations, output_grads = _by_position(activations, rows), _by_position(output_grads, rows)
    return {"weight": Outer(activations, output_grads), "bias": bias_of(output_grads)}


def _by_position(x: Tensor, rows: int) -> Tensor:
    """x as [b, 1, P, K]."""
    x = by_row(x, rows)
    return x.reshape(rows, 1, -1, x.shape[-1])


def bias_of(output_grads: Tensor) -> Outer:
    """A bias as the weight of a single input of ones, so that it can be joined with its layer's matrix."""
    return Outer(output_grads[..., :0], output_grads, ones=True)


def _is_gpt2_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" == "transformers.pytorch_utils.Conv1D"


@register_by_name(_is_gpt2_conv1d)
@takes_bfloat16
def transposed_linear(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """A linear layer whose weight is [inputs, outputs]."""
    activations, output_grads = _by_position(activations, rows), _by_position(output_grads, rows)
    return {"weight": Outer(output_grads, activations), "bias": Vector(widened(output_grads.sum((1, 2))))}
