"""Which function computes the per-sample gradients of a module, and the checks around its call."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.attributes import own_parameters, plain_parameters
from ine_callback.capture.errors import LayerError
from ine_callback.capture.layers.calls import Tensors
from ine_callback.capture.per_sample_gradients import GradSample, Vector, widened

# of the module, its activations, its output gradients (for layers with several: tensors by name) and the number of rows
LayerFunction = Callable[[nn.Module, Any, Any, int], Mapping[str, GradSample | Tensor]]

_BY_TYPE: dict[type[nn.Module], LayerFunction] = {}
_BY_NAME: list[tuple[Callable[[nn.Module], bool], LayerFunction]] = []

# functions whose per-sample gradients take factors in bfloat16; all others get float32
_BFLOAT16: set[LayerFunction] = set()

# of parameters, in layers that the package knows
_OWN_NAMES = re.compile(r"(weight|bias)(_(ih|hh)(_l\d+)?(_reverse)?)?")
_OWN_PACKAGE = __name__.rpartition(".")[0]


class RowMismatch(LayerError):
    """A layer's input cannot be split into the batch's rows."""


def register_layer(*types: type[nn.Module]) -> Callable[[LayerFunction], LayerFunction]:
    """Registers the function that computes the per-sample gradients of one or several layer types.

    A module uses the function of the nearest class in its MRO. The function gets the module, its first input, the
    gradient of the loss with respect to its output (both detached, in one dtype) and the number of rows. It returns for
    each trainable parameter the per-sample gradients ``[rows, *parameter.shape]``, or a :class:`~.GradSample`.

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
        ... def scale(module, activations, output_grads, rows):
        ...     return {"scale": (activations * output_grads).reshape(rows, -1, activations.shape[-1]).sum(1)}
    """
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"register_layer: {kind!r} is not a class of torch.nn.Module; pass the layer's class.")

    def register(function: LayerFunction) -> LayerFunction:
        for kind in types:
            _BY_TYPE[kind] = function
        return function

    return register


def register_by_name(matches: Callable[[nn.Module], bool]) -> Callable[[LayerFunction], LayerFunction]:
    """Registers a function for types of other libraries, which are recognised without being imported.

    What only has the name is dropped by the check of layer functions before the first step.

    Args:
        matches: Whether a module is of such a type. Types registered by class come first.
    """

    def register(function: LayerFunction) -> LayerFunction:
        _BY_NAME.append((matches, function))
        return function

    return register


def takes_bfloat16(function: LayerFunction) -> LayerFunction:
    """Marks a function that may get bfloat16: it only reshapes, and sums in float32."""
    _BFLOAT16.add(function)
    return function


def is_users(function: LayerFunction) -> bool:
    """Whether a function was registered by a user."""
    return not function.__module__.startswith(f"{_OWN_PACKAGE}.")


def layer_function(module: nn.Module) -> LayerFunction | None:
    """The function for a module, or None if its type is not known."""
    registered = next((_BY_TYPE[kind] for kind in type(module).__mro__ if kind in _BY_TYPE), None)
    return registered or next((function for matches, function in _BY_NAME if matches(module)), None)


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


def entries_of(activations: Tensors, rows: int) -> int:
    """Entries of a row that a layer gets behind one another: 5 of [b * 5, C, H, W], the frames of a video.

    Of a flattened matrix [b * k, d] there is 1, with k positions (:func:`by_row`).

    Example:
        >>> entries_of(torch.zeros(10, 3, 4, 4), rows=2), entries_of(torch.zeros(10, 3), rows=2)
        (5, 1)
    """
    if not isinstance(activations, Tensor):  # several sequences of a row are positions behind one another
        return 1
    flattened = activations.dim() == 2 and activations.is_floating_point()
    if activations.dim() < 2 or flattened or activations.shape[0] % rows:
        return 1
    return max(1, activations.shape[0] // rows)


def grad_samples_of(
    module: nn.Module, activations: Tensors, output_grads: Tensors, rows: int, function: LayerFunction | None = None
) -> dict[str, GradSample]:
    """Per-sample gradients of a module's trainable parameters, by its layer function (or by another one).

    Raises:
        LayerError: If the input cannot be split into rows, or the function returned something else than gradients.
    """
    function = function or layer_function(module)
    assert function is not None
    if isinstance(activations, Tensor) and isinstance(output_grads, Tensor):
        activations, output_grads = _for_function(function, activations, output_grads)
    elif isinstance(activations, dict) and isinstance(output_grads, dict):
        activations, output_grads = _all_in_one_precision(activations, output_grads)
    parameters, out = plain_parameters(module), {}
    for name, value in function(module, activations, output_grads, rows).items():
        parameter = parameters.get(name)  # None: the parameter is computed from others, which are named as left out
        if parameter is not None and parameter.requires_grad and parameter.numel():
            out[name] = _checked(value, name, parameter, rows, type(module).__name__)
    return out


def _for_function(function: LayerFunction, activations: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor]:
    """Dense tensors in one precision."""
    activations = activations if activations.layout == torch.strided else activations.to_dense()
    if function not in _BFLOAT16 or output_grads.dtype != torch.bfloat16 or activations.dtype == torch.float16:
        activations, output_grads = _in_one_precision(activations, output_grads)
    if is_users(function):
        # a user's function may write into its arguments, which are the training's tensors
        activations, output_grads = activations.clone(), output_grads.clone()
    return activations, output_grads


def _checked(value: GradSample | Tensor, name: str, parameter: nn.Parameter, rows: int, kind: str) -> GradSample:
    """What a function returned for a parameter, as a GradSample of the right shape and number of rows."""
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


def _in_one_precision(activations: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor]:
    output_grads = widened(output_grads)
    return (activations.to(output_grads.dtype) if activations.is_floating_point() else activations), output_grads


def _all_in_one_precision(
    activations: dict[str, Tensor], output_grads: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    output_grads = {name: widened(grad) for name, grad in output_grads.items()}
    like = next(iter(output_grads.values()))
    return {name: _in_one_precision(x, like)[0] for name, x in activations.items()}, output_grads


def is_capturable(module: nn.Module) -> bool:
    """Whether a module has a layer function, and parameters of its own."""
    return layer_function(module) is not None and bool(own_parameters(module))


def given_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The own parameters that a layer's function may give gradients of, by name.

    Not those that ``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune`` add, of which a weight is computed.

    Example:
        >>> list(given_parameters(nn.utils.spectral_norm(nn.Linear(2, 1))))
        ['bias']
    """
    function, own = layer_function(module), own_parameters(module)
    if function is None:
        return {}
    return own if is_users(function) else {name: p for name, p in own.items() if _OWN_NAMES.fullmatch(name)}
