"""Normalization layers: scale and shift, whose per-sample gradients are small enough to be formed."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.attributes import buffer, own_parameters, setting
from ine_callback.capture.layers.registry import LayerFunction, RowMismatch, by_row, register_by_name, register_layer
from ine_callback.capture.per_sample_gradients import GradSample, Vector

# modules whose forward pass mixes the rows of a batch: contributions still add up, single rows are approximate
ROW_MIXING_TYPES = (nn.modules.batchnorm._BatchNorm,)


@register_layer(nn.LayerNorm)
def layer_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift over the normalized dimensions; in ConvNeXt's subclass these are the channels (dimension 1)."""
    shape = list(setting(module, "normalized_shape"))
    if list(activations.shape[activations.dim() - len(shape) :]) != shape and list(activations.shape[1:2]) == shape:
        return channel_layer_norm(module, activations, output_grads, rows)
    return _affine(F.layer_norm(activations, shape, eps=setting(module, "eps")), output_grads, rows, len(shape))


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
def rms_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale over the normalized dimensions."""
    shape = list(setting(module, "normalized_shape"))
    return _affine(F.rms_norm(activations, shape, eps=setting(module, "eps")), output_grads, rows, len(shape))


@register_by_name(_is_named_rms_norm)
def named_rms_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """RMSNorm of another library over the last dimension. Scales by the weight or by 1 + weight have one gradient."""
    epsilon = _epsilon(module)
    return _affine(F.rms_norm(activations, [activations.shape[-1]], eps=epsilon), output_grads, rows, 1)


@register_by_name(_is_named_layer_norm)
def named_layer_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """LayerNorm of another library over the last dimension, or over the channels if only these fit the weight."""
    width = own_parameters(module)["weight"].numel()
    if activations.shape[-1] != width and activations.shape[1:2] == (width,):
        return channel_layer_norm(module, activations, output_grads, rows)
    return _affine(F.layer_norm(activations, [width], eps=_epsilon(module) or 0.0), output_grads, rows, 1)


# for subclasses with another forward pass: what layer_functions_check.py tries when the function does not fit
ALTERNATIVES: dict[LayerFunction, LayerFunction] = {
    layer_norm: channel_layer_norm,
    named_layer_norm: channel_layer_norm,
}


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of a norm, whatever the class calls it."""
    found = (setting(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in found if isinstance(value, float)), None)


def _affine(normed: Tensor, output_grads: Tensor, rows: int, trailing: int) -> dict[str, GradSample]:
    """Scale and shift over the last ``trailing`` dimensions."""
    size = math.prod(output_grads.shape[output_grads.dim() - trailing :])
    scale, shift = (normed * output_grads).reshape(-1, size), output_grads.reshape(-1, size)
    if output_grads.shape[0] != rows and not (output_grads.dim() == 2 and output_grads.shape[0] % rows == 0):
        raise RowMismatch(f"leading dimension {output_grads.shape[0]} is not the batch size {rows}")
    return {"weight": Vector(scale.view(rows, -1, size).sum(1)), "bias": Vector(shift.view(rows, -1, size).sum(1))}


def summed_affine(
    module: nn.Module, activations: object, gradients: dict[str, Tensor], rows: int
) -> dict[str, GradSample]:
    """Scale and shift whose gradients [n, D] compiled code has formed, for the n entries that led the norm's input."""
    (n, *_) = gradients["weight"].shape
    if n % rows:
        raise RowMismatch(f"leading dimension {n} is not a multiple of the batch size {rows}")
    return {name: Vector(each.view(rows, n // rows, -1).sum(1)) for name, each in gradients.items()}


@register_layer(nn.GroupNorm)
def group_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift for each channel."""
    normed = F.group_norm(activations, setting(module, "num_groups"), eps=setting(module, "eps"))
    return _channel_affine(normed, output_grads, rows)


@register_layer(nn.modules.batchnorm._BatchNorm)
def batch_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift for each channel. In training, a batch's statistics mix its rows: single rows are approximate."""
    mean, variance, eps = buffer(module, "running_mean"), buffer(module, "running_var"), setting(module, "eps")
    if setting(module, "training") or mean is None:
        normed = F.batch_norm(activations, None, None, training=True, eps=eps)
    else:
        normed = F.batch_norm(activations, mean, variance, training=False, eps=eps)
    return _channel_affine(normed, output_grads, rows)


@register_layer(nn.modules.instancenorm._InstanceNorm)
def instance_norm(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift for each channel; every row has its own statistics."""
    per_row = setting(module, "training") or not setting(module, "track_running_stats")
    mean, variance = (None if per_row else buffer(module, name) for name in ("running_mean", "running_var"))
    normed = F.instance_norm(activations, mean, variance, use_input_stats=per_row, eps=setting(module, "eps"))
    return _channel_affine(normed, output_grads, rows)


def _channel_affine(normed: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift for each channel (dimension 1)."""
    if output_grads.dim() == 2:
        return _affine(normed, output_grads, rows, 1)
    output_grads = by_row(output_grads, rows)
    return {"weight": Vector((normed * output_grads).flatten(2).sum(2)), "bias": Vector(output_grads.flatten(2).sum(2))}
