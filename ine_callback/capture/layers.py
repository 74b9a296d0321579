"""One small function per layer type: from a module's input and output gradient to the records of its parameters.

Add a layer type with one decorated function::

    @register_layer(MyLayer)
    def my_layer(module, a, delta, rows):
        return {"scale": torch.einsum("b...d,b...d->bd", a, delta)}

It gets the module, its first input ``a``, the gradient ``delta`` of the loss with respect to its output (both detached,
in one dtype) and the number of rows, and returns for each trainable parameter either a
:class:`~ine_callback.capture.per_sample_gradients.Record` or the per-row gradients [b, *parameter.shape].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.per_sample_gradients import Lookup, Outer, Record, Vector, widened
from ine_callback.capture.windows import Kernel, Windows

LayerFunction = Callable[[nn.Module, Tensor, Tensor, int], Mapping[str, Record | Tensor]]

_REGISTRY: dict[type[nn.Module], LayerFunction] = {}

# modules whose forward pass mixes the rows of a batch: shares still add up, single rows are approximate
ROW_MIXING = (nn.modules.batchnorm._BatchNorm,)


class RowMismatch(ValueError):
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
    """Types of other libraries, none of which is imported: GPT-2's Conv1D and the many classes called RMSNorm.

    The first step's proof drops what only has the name.
    """
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" == "transformers.pytorch_utils.Conv1D":
        return transposed_linear
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if kind.__name__.endswith(("RMSNorm", "T5LayerNorm")) and own == ["weight"] and _epsilon(module) is not None:
        return named_rms_norm
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
def linear(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """Any leading dimensions: positions are whatever lies between the row and the features."""
    a, delta = by_row(a, rows), by_row(delta, rows)
    return _weight_and_bias(a.reshape(rows, 1, -1, a.shape[-1]), delta.reshape(rows, 1, -1, delta.shape[-1]))


def _weight_and_bias(a: Tensor, delta: Tensor) -> dict[str, Record]:
    return {"weight": Outer(a, delta), "bias": _bias(delta)}


def _bias(delta: Tensor) -> Outer:
    """A bias as the weight of an input of ones and nothing else, so that it can join its layer's matrix."""
    return Outer(delta[..., :0], delta, ones=True)


def transposed_linear(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """A linear layer whose weight is [inputs, outputs]."""
    a, delta = by_row(a, rows), by_row(delta, rows)
    a, delta = a.reshape(rows, 1, -1, a.shape[-1]), delta.reshape(rows, 1, -1, delta.shape[-1])
    return {"weight": Outer(delta, a), "bias": Vector(widened(delta.sum((1, 2))))}  # a sum is added up in float32


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """A linear layer on patches, one for each group."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    a, delta = by_row(a, rows), by_row(delta, rows)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(a, module._reversed_padding_repeated_twice, mode=mode)
    kernel = Kernel(module.kernel_size, module.stride, module.dilation, module.groups)
    record = Windows(padded, _channels_last(delta, module.groups), kernel=kernel)
    return {"weight": record, "bias": _bias(record.delta)}


@register_layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """The roles swap: patches are cut from the output gradient, and the weight's leading dimension is the input's."""
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    a, delta = by_row(a, rows), by_row(delta, rows)
    padding = module._reversed_padding_repeated_twice
    kernel = Kernel(module.kernel_size, module.stride, module.dilation, module.groups)
    padded = F.pad(delta, padding)
    for d, (length, k, s, r) in enumerate(zip(a.shape[2:], kernel.size, kernel.stride, kernel.dilation, strict=True)):
        padded = padded.narrow(2 + d, 0, (length - 1) * s + r * (k - 1) + 1)  # output padding has no window
    windows = kernel.cut(padded)
    return {"weight": Outer(windows, _channels_last(a, module.groups)), "bias": Vector(delta.flatten(2).sum(2))}


def _channels_last(x: Tensor, groups: int) -> Tensor:
    """x [b, C, *space] as [b, G, P, C/G]."""
    grouped: Tensor = x.flatten(2).unflatten(1, (groups, -1))
    return grouped.transpose(2, 3)


@register_layer(nn.Embedding)
def embedding(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """A row's gradient touches the entries that it looked up; the padding entry has none."""
    assert isinstance(module, nn.Embedding)
    if a.dim() == 0 or a.shape[0] != rows:  # positions shared by all rows: their gradient is already summed over rows
        raise RowMismatch(f"looked-up entries of shape {tuple(a.shape)} do not lead with the batch size {rows}")
    ids, delta = a.reshape(rows, -1), delta.reshape(rows, -1, module.embedding_dim)
    if module.padding_idx is not None:
        delta = delta * (ids != module.padding_idx)[..., None]
    if module.scale_grad_by_freq:
        delta = delta / ids.flatten().bincount(minlength=module.num_embeddings)[ids][..., None]
    return {"weight": Lookup(ids, delta, module.num_embeddings)}


@register_layer(nn.LayerNorm)
def layer_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """Scale and shift over the normalized dimensions."""
    assert isinstance(module, nn.LayerNorm)
    return _affine(F.layer_norm(a, module.normalized_shape, eps=module.eps), delta, rows, len(module.normalized_shape))


@register_layer(nn.RMSNorm)
def rms_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """Scale over the normalized dimensions."""
    assert isinstance(module, nn.RMSNorm)
    shape = list(module.normalized_shape)
    return _affine(F.rms_norm(a, shape, eps=module.eps), delta, rows, len(shape))


def named_rms_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """RMSNorm over the last dimension; whether the scale is the weight or 1 + weight, its gradient is the same."""
    epsilon = _epsilon(module)
    return _affine(F.rms_norm(a, [a.shape[-1]], eps=epsilon), delta, rows, 1)


def _epsilon(module: nn.Module) -> float | None:
    """What the class calls eps."""
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in found if isinstance(value, float)), None)


def _affine(normed: Tensor, delta: Tensor, rows: int, trailing: int) -> dict[str, Record]:
    """Scale and shift over the last ``trailing`` dimensions."""
    size = math.prod(delta.shape[delta.dim() - trailing :])
    scale, shift = (normed * delta).reshape(-1, size), delta.reshape(-1, size)
    if delta.shape[0] != rows and not (delta.dim() == 2 and delta.shape[0] % rows == 0):
        raise RowMismatch(f"leading dimension {delta.shape[0]} is not the batch size {rows}")
    return {"weight": Vector(scale.view(rows, -1, size).sum(1)), "bias": Vector(shift.view(rows, -1, size).sum(1))}


@register_layer(nn.GroupNorm)
def group_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """Scale and shift per channel."""
    assert isinstance(module, nn.GroupNorm)
    return _channel_affine(F.group_norm(a, module.num_groups, eps=module.eps), delta, rows)


@register_layer(nn.modules.batchnorm._BatchNorm)
def batch_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """Affine part only; the statistics couple the rows of a batch, which no per-row gradient can undo."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    if module.training or module.running_mean is None:
        normed = F.batch_norm(a, None, None, training=True, eps=module.eps)
    else:
        normed = F.batch_norm(a, module.running_mean, module.running_var, training=False, eps=module.eps)
    return _channel_affine(normed, delta, rows)


@register_layer(nn.modules.instancenorm._InstanceNorm)
def instance_norm(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """Scale and shift per channel; every row has its own statistics."""
    assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
    own = module.training or not module.track_running_stats
    normed = F.instance_norm(
        a,
        None if own else module.running_mean,
        None if own else module.running_var,
        use_input_stats=own,
        eps=module.eps,
    )
    return _channel_affine(normed, delta, rows)


def _channel_affine(normed: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """Scale and shift per channel (dimension 1)."""
    if delta.dim() == 2:
        return _affine(normed, delta, rows, 1)
    delta = by_row(delta, rows)
    return {"weight": Vector((normed * delta).flatten(2).sum(2)), "bias": Vector(delta.flatten(2).sum(2))}


# functions whose records take factors in bfloat16; all others get them in float32
_ANY_PRECISION = (linear, transposed_linear, convolution)


def records_of(module: nn.Module, a: Tensor, delta: Tensor, rows: int) -> dict[str, Record]:
    """Calls the module's capture function and wraps bare per-row gradients.

    Raises:
        RowMismatch: If the input cannot be split into rows, or a returned tensor has the wrong shape.
    """
    function = layer_function(module)
    assert function is not None
    if function not in _ANY_PRECISION or delta.dtype != torch.bfloat16 or a.dtype == torch.float16:
        a, delta = _in_one_precision(a, delta)
    out: dict[str, Record] = {}
    for name, value in function(module, a, delta, rows).items():
        parameter = getattr(module, name, None)
        if parameter is None or not parameter.requires_grad:
            continue
        if isinstance(value, Tensor):
            if value.shape != (rows, *parameter.shape):
                raise RowMismatch(
                    f"the function registered for {type(module).__name__} returned {tuple(value.shape)} for "
                    f"'{name}', which must be (rows, *parameter.shape) = {(rows, *parameter.shape)}"
                )
            value = Vector(value.flatten(1))
        out[name] = value
    return out


def _in_one_precision(a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    delta = widened(delta)
    return (a.to(delta.dtype) if a.is_floating_point() else a), delta
