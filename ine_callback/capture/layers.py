"""One small function per layer type: from a module's input and output gradient to the records of its parameters.

Add a layer type with one decorated function::

    @register_layer(MyLayer)
    def my_layer(module, a, delta, rows):
        return {"scale": torch.einsum("b...d,b...d->bd", a, delta)}

It gets the module, its first input ``a``, the gradient ``delta`` of the loss with respect to its output (both detached,
in one dtype) and the number of rows, and returns for each trainable parameter either a
:class:`~ine_callback.capture.per_sample_gradients.GradSample` or the per-row gradients [b, *parameter.shape].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.attributes import LayerError, buffer, own_parameters, plain_parameters, setting
from ine_callback.capture.per_sample_gradients import GradSample, Lookup, Outer, Vector, widened
from ine_callback.capture.windows import Kernel, Windows

LayerFunction = Callable[[nn.Module, Tensor, Tensor, int], Mapping[str, GradSample | Tensor]]

_REGISTRY: dict[type[nn.Module], LayerFunction] = {}

# modules whose forward pass mixes the rows of a batch: shares still add up, single rows are approximate
ROW_MIXING = (nn.modules.batchnorm._BatchNorm,)


class RowMismatch(LayerError):
    """A layer's input cannot be split into the batch's rows."""


def register_layer(*types: type[nn.Module]) -> Callable[[LayerFunction], LayerFunction]:
    """Registers the capture function of one or several layer types; the nearest class in the MRO wins.

    Args:
        types: Subclasses of ``torch.nn.Module``.

    Returns:
        A decorator that leaves the function as it is.

    Raises:
        TypeError: If a type is not a module class.

    Example:
        >>> import torch
        >>> from ine_callback import register_layer
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.ones(width))
        ...
        ...     def forward(self, x):
        ...         return x * self.scale
        >>> @register_layer(Scale)
        ... def scale(module, a, delta, rows):
        ...     return {"scale": (a * delta).reshape(rows, -1, a.shape[-1]).sum(1)}
    """
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"register_layer: {kind!r} is not a class of torch.nn.Module; pass the layer's class.")

    def register(function: LayerFunction) -> LayerFunction:
        for kind in types:
            _REGISTRY[kind] = function
        return function

    return register


def layer_function(module: nn.Module) -> LayerFunction | None:
    """The capture function of a module, or None where its type is not known."""
    registered = next((_REGISTRY[kind] for kind in type(module).__mro__ if kind in _REGISTRY), None)
    return registered or _known_by_name(module)


def _known_by_name(module: nn.Module) -> LayerFunction | None:
    """Types of other libraries, none of which is imported: GPT-2's Conv1D, the many called RMSNorm or LayerNorm2d.

    The rows' check before the first step drops what only has the name.
    """
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" == "transformers.pytorch_utils.Conv1D":
        return transposed_linear
    own = own_parameters(module)
    if _epsilon(module) is None or list(own) not in (["weight"], ["weight", "bias"]):
        return None
    if kind.__name__.endswith(("RMSNorm", "T5LayerNorm")) and len(own) == 1:
        return named_rms_norm
    if kind.__name__.endswith(("LayerNorm", "LayerNorm2d")) and own["weight"].dim() == 1:
        return named_layer_norm
    return None


def by_row(x: Tensor, rows: int) -> Tensor:
    """Splits the leading dimension: [b, ...] stays, [b * k, d] (rows flattened with their tokens) becomes [b, k, d].

    Raises:
        RowMismatch: If the leading dimension is neither the batch size nor, for a flattened matrix, a multiple of it.
    """
    if x.dim() > 0 and x.shape[0] == rows:
        return x
    if x.dim() == 2 and x.shape[0] % rows == 0 and x.shape[0] > 0:
        return x.view(rows, -1, x.shape[1]) if x.is_contiguous() else x.reshape(rows, -1, x.shape[1])
    raise RowMismatch(f"leading dimension {x.shape[0] if x.dim() else 'of a scalar'} is not the batch size {rows}")


@register_layer(nn.Linear)
def linear(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """Any leading dimensions: positions are whatever lies between the row and the features."""
    a, delta = by_row(a, rows), by_row(delta, rows)
    return _weight_and_bias(a.reshape(rows, 1, -1, a.shape[-1]), delta.reshape(rows, 1, -1, delta.shape[-1]))


def _weight_and_bias(a: Tensor, delta: Tensor) -> dict[str, GradSample]:
    return {"weight": Outer(a, delta), "bias": _bias(delta)}


def _bias(delta: Tensor) -> Outer:
    """A bias as the weight of an input of ones and nothing else, so that it can join its layer's matrix."""
    return Outer(delta[..., :0], delta, ones=True)


def transposed_linear(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """A linear layer whose weight is [inputs, outputs]."""
    a, delta = by_row(a, rows), by_row(delta, rows)
    a, delta = a.reshape(rows, 1, -1, a.shape[-1]), delta.reshape(rows, 1, -1, delta.shape[-1])
    return {"weight": Outer(delta, a), "bias": Vector(widened(delta.sum((1, 2))))}  # a sum is added up in float32


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """A linear layer on patches, one for each group."""
    a, delta = by_row(a, rows), by_row(delta, rows)
    mode = setting(module, "padding_mode")
    mode = "constant" if mode == "zeros" else mode
    padded = F.pad(a, setting(module, "_reversed_padding_repeated_twice"), mode=mode)
    kernel = _kernel(module)
    grad_sample = Windows(padded, _channels_last(delta, kernel.groups), kernel=kernel)
    return {"weight": grad_sample, "bias": _bias(grad_sample.delta)}


@register_layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """The roles swap: patches are cut from the output gradient, and the weight's leading dimension is the input's."""
    a, delta = by_row(a, rows), by_row(delta, rows)
    kernel = _kernel(module)
    padded = F.pad(delta, setting(module, "_reversed_padding_repeated_twice"))
    for d, (length, k, s, r) in enumerate(zip(a.shape[2:], kernel.size, kernel.stride, kernel.dilation, strict=True)):
        padded = padded.narrow(2 + d, 0, (length - 1) * s + r * (k - 1) + 1)  # output padding has no window
    windows = kernel.cut(padded)
    return {"weight": Outer(windows, _channels_last(a, kernel.groups)), "bias": Vector(delta.flatten(2).sum(2))}


def _kernel(module: nn.Module) -> Kernel:
    return Kernel(*(setting(module, name) for name in ("kernel_size", "stride", "dilation", "groups")))


def _channels_last(x: Tensor, groups: int) -> Tensor:
    """x [b, C, *space] as [b, G, P, C/G]."""
    grouped: Tensor = x.flatten(2).unflatten(1, (groups, -1))
    return grouped.transpose(2, 3)


@register_layer(nn.Embedding)
def embedding(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """A row's gradient touches the entries that it looked up; the padding entry has none."""
    entries, width = setting(module, "num_embeddings"), setting(module, "embedding_dim")
    if a.dim() == 0 or a.shape[0] != rows:  # positions shared by all rows: their gradient is already summed over rows
        raise RowMismatch(f"looked-up entries of shape {tuple(a.shape)} do not lead with the batch size {rows}")
    ids, delta = a.reshape(rows, -1), delta.reshape(rows, -1, width)
    padding = setting(module, "padding_idx")
    if padding is not None:
        delta = delta * (ids != padding)[..., None]
    if setting(module, "scale_grad_by_freq"):
        delta = delta / ids.flatten().bincount(minlength=entries)[ids][..., None]
    return {"weight": Lookup(ids, delta, entries)}


@register_layer(nn.LayerNorm)
def layer_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift over the normalized dimensions; ConvNeXt's subclass has the channels behind the row instead."""
    shape = list(setting(module, "normalized_shape"))
    if list(a.shape[a.dim() - len(shape) :]) != shape and list(a.shape[1:2]) == shape:
        return channel_layer_norm(module, a, delta, rows)
    return _affine(F.layer_norm(a, shape, eps=setting(module, "eps")), delta, rows, len(shape))


def channel_layer_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """The same over the channels (dimension 1) of each position."""
    normed = F.layer_norm(a.movedim(1, -1), [a.shape[1]], eps=_epsilon(module) or 0.0)
    return _channel_affine(normed.movedim(-1, 1), delta, rows)


def named_layer_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """LayerNorm of another library over the last dimension, or the channels where only these fit."""
    width = own_parameters(module)["weight"].numel()
    if a.shape[-1] != width and a.shape[1:2] == (width,):
        return channel_layer_norm(module, a, delta, rows)
    return _affine(F.layer_norm(a, [width], eps=_epsilon(module) or 0.0), delta, rows, 1)


@register_layer(nn.RMSNorm)
def rms_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale over the normalized dimensions."""
    shape = list(setting(module, "normalized_shape"))
    return _affine(F.rms_norm(a, shape, eps=setting(module, "eps")), delta, rows, len(shape))


def named_rms_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """RMSNorm over the last dimension; whether the scale is the weight or 1 + weight, its gradient is the same."""
    epsilon = _epsilon(module)
    return _affine(F.rms_norm(a, [a.shape[-1]], eps=epsilon), delta, rows, 1)


def _epsilon(module: nn.Module) -> float | None:
    """What the class calls eps."""
    found = (setting(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in found if isinstance(value, float)), None)


def _affine(normed: Tensor, delta: Tensor, rows: int, trailing: int) -> dict[str, GradSample]:
    """Scale and shift over the last ``trailing`` dimensions."""
    size = math.prod(delta.shape[delta.dim() - trailing :])
    scale, shift = (normed * delta).reshape(-1, size), delta.reshape(-1, size)
    if delta.shape[0] != rows and not (delta.dim() == 2 and delta.shape[0] % rows == 0):
        raise RowMismatch(f"leading dimension {delta.shape[0]} is not the batch size {rows}")
    return {"weight": Vector(scale.view(rows, -1, size).sum(1)), "bias": Vector(shift.view(rows, -1, size).sum(1))}


@register_layer(nn.GroupNorm)
def group_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift per channel."""
    normed = F.group_norm(a, setting(module, "num_groups"), eps=setting(module, "eps"))
    return _channel_affine(normed, delta, rows)


@register_layer(nn.modules.batchnorm._BatchNorm)
def batch_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """Affine part only; the statistics couple the rows of a batch, which no per-row gradient can undo."""
    mean, variance, eps = buffer(module, "running_mean"), buffer(module, "running_var"), setting(module, "eps")
    if setting(module, "training") or mean is None:
        normed = F.batch_norm(a, None, None, training=True, eps=eps)
    else:
        normed = F.batch_norm(a, mean, variance, training=False, eps=eps)
    return _channel_affine(normed, delta, rows)


@register_layer(nn.modules.instancenorm._InstanceNorm)
def instance_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift per channel; every row has its own statistics."""
    own = setting(module, "training") or not setting(module, "track_running_stats")
    mean, variance = (None if own else buffer(module, name) for name in ("running_mean", "running_var"))
    normed = F.instance_norm(a, mean, variance, use_input_stats=own, eps=setting(module, "eps"))
    return _channel_affine(normed, delta, rows)


def _channel_affine(normed: Tensor, delta: Tensor, rows: int) -> dict[str, GradSample]:
    """Scale and shift per channel (dimension 1)."""
    if delta.dim() == 2:
        return _affine(normed, delta, rows, 1)
    delta = by_row(delta, rows)
    return {"weight": Vector((normed * delta).flatten(2).sum(2)), "bias": Vector(delta.flatten(2).sum(2))}


# functions whose records take factors in bfloat16; all others get them in float32
_ANY_PRECISION = (linear, transposed_linear, convolution)

# what a class of another forward pass may be instead: the rows' check (capture/odd.py) takes the one that fits
ALTERNATIVES: dict[LayerFunction, LayerFunction] = {
    layer_norm: channel_layer_norm,
    named_layer_norm: channel_layer_norm,
}


def grad_samples_of(
    module: nn.Module, a: Tensor, delta: Tensor, rows: int, function: LayerFunction | None = None
) -> dict[str, GradSample]:
    """Calls the module's capture function (or another) and wraps bare per-row gradients.

    Raises:
        LayerError: If the input cannot be split into rows, or what the function returned is no parameter's.
    """
    function = function or layer_function(module)
    assert function is not None
    a = a if a.layout == torch.strided else a.to_dense()
    if function not in _ANY_PRECISION or delta.dtype != torch.bfloat16 or a.dtype == torch.float16:
        a, delta = _in_one_precision(a, delta)
    if function.__module__ != __name__:
        a, delta = a.clone(), delta.clone()  # a user's function may write into them, and they are the training's
    parameters, out = plain_parameters(module), {}
    for name, value in function(module, a, delta, rows).items():
        parameter = parameters.get(name)  # none of that name: it is computed, and what it is made of is left out
        if parameter is not None and parameter.requires_grad and parameter.numel():
            out[name] = _checked(value, name, parameter, rows, type(module).__name__)
    return out


def _checked(value: GradSample | Tensor, name: str, parameter: nn.Parameter, rows: int, kind: str) -> GradSample:
    """A record of the parameter's shape and the batch's rows, whatever the function returned."""
    if isinstance(value, Tensor):
        if value.shape != (rows, *parameter.shape):
            raise RowMismatch(
                f"the function registered for {kind} returned {tuple(value.shape)} for "
                f"'{name}', which must be (rows, *parameter.shape) = {(rows, *parameter.shape)}"
            )
        value = Vector(value.reshape(rows, parameter.numel()))
    if not isinstance(value, GradSample):
        raise LayerError(f"the function registered for {kind} returned a {type(value).__name__} for '{name}'")
    if value.rows != rows or math.prod(value.layout) != parameter.numel():
        raise RowMismatch(
            f"the function registered for {kind} returned {value.rows} rows of {value.layout} for '{name}', which must "
            f"be {rows} rows of {tuple(parameter.shape)}"
        )
    if not value.dtype.is_floating_point:
        raise LayerError(f"the gradients of '{name}' are of {value.dtype}, which no score is made of")
    return value


def _in_one_precision(a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    delta = widened(delta)
    return (a.to(delta.dtype) if a.is_floating_point() else a), delta
