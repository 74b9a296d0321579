"""Normalization layers: scale and shift, whose per-sample gradients are small enough to be formed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.attributes import buffer, own_parameters, setting
from ine_callback.capture.layers.registry import (
    LayerFunction,
    RowMismatch,
    by_row,
    register_by_name,
    register_layer,
    takes_bfloat16,
)
from ine_callback.capture.per_sample_gradients import GradSample, Vector, wide_sum, widened
from ine_callback.utilities.fused import Fused

# modules whose forward pass mixes the rows of a batch: contributions still add up, single rows are approximate
ROW_MIXING_TYPES = (nn.modules.batchnorm._BatchNorm,)


@register_layer(nn.LayerNorm)
@takes_bfloat16
def layer_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift over the normalized dimensions; in ConvNeXt's subclass these are the channels (dimension 1)."""
    shape = list(setting(module, "normalized_shape"))
    if list(activations.shape[activations.dim() - len(shape) :]) != shape and list(activations.shape[1:2]) == shape:
        return channel_layer_norm(module, activations, output_grads, rows)
    return _trailing(activations, output_grads, rows, len(shape), setting(module, "eps"))


def channel_layer_norm(
    module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int
) -> dict[str, GradSample]:
    """LayerNorm over the channels (dimension 1) of each position."""
    normed = F.layer_norm(activations.movedim(1, -1), [activations.shape[1]], eps=_epsilon(module) or 0.0)
    return _channel_affine(normed.movedim(-1, 1), output_grads, rows)


def _named_like_torch(module: nn.Module, *endings: str) -> bool:
    """Whether a class of another library has such a name, an epsilon and the parameters of a norm."""
    parameters = list(own_parameters(module))
    named = type(module).__name__.endswith(endings)
    return named and _epsilon(module) is not None and parameters in (["weight"], ["weight", "bias"])


def _is_named_rms_norm(module: nn.Module) -> bool:
    return _named_like_torch(module, "RMSNorm", "T5LayerNorm") and len(own_parameters(module)) == 1


def _is_named_layer_norm(module: nn.Module) -> bool:
    return _named_like_torch(module, "LayerNorm", "LayerNorm2d") and own_parameters(module)["weight"].dim() == 1


@register_layer(nn.RMSNorm)
@takes_bfloat16
def rms_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale over the normalized dimensions."""
    trailing = len(setting(module, "normalized_shape"))
    return _trailing(activations, output_grads, rows, trailing, setting(module, "eps"), mean=False)


@register_by_name(_is_named_rms_norm)
@takes_bfloat16
def named_rms_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """RMSNorm of another library over the last dimension. Scales by the weight or by 1 + weight have one gradient."""
    return _trailing(activations, output_grads, rows, 1, _epsilon(module), mean=False)


@register_by_name(_is_named_layer_norm)
@takes_bfloat16
def named_layer_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """LayerNorm of another library over the last dimension, or over the channels if only these fit the weight."""
    width = own_parameters(module)["weight"].numel()
    if activations.shape[-1] != width and activations.shape[1:2] == (width,):
        return channel_layer_norm(module, activations, output_grads, rows)
    return _trailing(activations, output_grads, rows, 1, _epsilon(module) or 0.0)


# for subclasses with another forward pass: what layer_functions_check.py tries when the function does not fit
ALTERNATIVES: dict[LayerFunction, LayerFunction] = {
    layer_norm: channel_layer_norm,
    named_layer_norm: channel_layer_norm,
}


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of a norm, whatever the class calls it."""
    found = (setting(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in found if isinstance(value, float)), None)


@Fused
def norm_sums(
    x: Tensor, output_grads: Tensor, trailing: int, eps: float | None, mean: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients of a norm's scale and shift [n, D], by each of the n entries that lead what it got.

    Args:
        x: What the norm got [n, ...].
        output_grads: Gradients of what it returned.
        trailing: How many dimensions it norms, the last ones.
        eps: Its epsilon.
        mean: Whether it subtracts the mean (LayerNorm), or does not (RMSNorm).
    """
    shape = x.shape[x.dim() - trailing :]
    normed = F.layer_norm(x, shape, eps=eps or 0.0) if mean else F.rms_norm(x, shape, eps=eps)
    by_entry = [g.reshape(x.shape[0], -1, shape.numel()) for g in (normed * output_grads, output_grads)]
    return wide_sum(by_entry[0], 1), wide_sum(by_entry[1], 1)


def _trailing(
    activations: Tensor, output_grads: Tensor, rows: int, trailing: int, eps: float | None, mean: bool = True
) -> dict[str, GradSample]:
    """Scale and shift of a norm over the last ``trailing`` dimensions."""
    x, output_grads = by_row(activations, rows), by_row(output_grads, rows)
    return _affine(*norm_sums(x, output_grads, trailing, eps, mean))


def summed_norm(
    module: nn.Module, activations: object, gradients: dict[str, Tensor], rows: int
) -> dict[str, GradSample]:
    """Scale and shift whose gradients [n, D] compiled code has formed, for the n entries that led the norm's input."""
    (n, *_) = gradients["weight"].shape
    if n % rows:
        raise RowMismatch(f"leading dimension {n} is not a multiple of the batch size {rows}")
    return {name: Vector(each.view(rows, n // rows, -1).sum(1)) for name, each in gradients.items()}


@register_layer(nn.GroupNorm)
@takes_bfloat16
def group_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift for each channel."""
    normed = F.group_norm(activations, setting(module, "num_groups"), eps=setting(module, "eps"))
    return _channel_affine(normed, output_grads, rows)


@register_layer(nn.modules.batchnorm._BatchNorm)
@takes_bfloat16
def batch_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift for each channel. In training, a batch's statistics mix its rows: single rows are approximate."""
    mean, variance, eps = buffer(module, "running_mean"), buffer(module, "running_var"), setting(module, "eps")
    if setting(module, "training") or mean is None or variance is None:
        mean, rstd = _statistics(activations, eps)
    else:
        mean, rstd = widened(mean), (widened(variance) + eps).rsqrt()
    # the mean as precise as the activations, which keep their precision; what it misses comes after the sums
    near = mean.to(activations.dtype)
    scale, shift = channel_sums(_by_channel(activations, rows), _by_channel(output_grads, rows), near)
    return _affine((scale + (near - mean) * shift) * rstd, shift)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of each channel [C], in float32 or better."""
    if x.is_cuda:  # in one pass, without a copy
        return torch.batch_norm_stats(x, eps)
    variance, mean = torch.var_mean(widened(x), [0, *range(2, x.dim())], correction=0)
    return mean, (variance + eps).rsqrt()


@register_layer(nn.modules.instancenorm._InstanceNorm)
@takes_bfloat16
def instance_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift for each channel; every row has its own statistics."""
    per_row = setting(module, "training") or not setting(module, "track_running_stats")
    mean, variance = (None if per_row else buffer(module, name) for name in ("running_mean", "running_var"))
    normed = F.instance_norm(activations, mean, variance, use_input_stats=per_row, eps=setting(module, "eps"))
    return _channel_affine(normed, output_grads, rows)


def _channel_affine(normed: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift for each channel (dimension 1)."""
    return _affine(*channel_sums(_by_channel(normed, rows), _by_channel(output_grads, rows)))


def _by_channel(x: Tensor, rows: int) -> Tensor:
    """x as [b, C, P]; of a matrix [b * P, C], P entries of a row are behind one another."""
    found = by_row(x, rows)
    return found.reshape(rows, -1, x.shape[1]).mT if x.dim() == 2 else found.flatten(2)


@Fused
def channel_sums(x: Tensor, output_grads: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row's sums over positions of x, less a mean [C], times output gradients [b, C, P], and of these: [b, C]."""
    products = (x if mean is None else x - mean[:, None]) * output_grads
    return wide_sum(products, 2), wide_sum(output_grads, 2)


def _affine(scale: Tensor, shift: Tensor) -> dict[str, GradSample]:
    return {"weight": Vector(scale), "bias": Vector(shift)}
