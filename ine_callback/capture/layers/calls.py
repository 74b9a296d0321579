"""A layer's call as tensors: what its layer function will need, and the outputs whose gradients it waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ine_callback.data.nested import is_jagged, is_led, rows_of, values_of

Tensors = Tensor | dict[str, Tensor]


def first_of(tensors: Tensors) -> Tensor:
    """The tensor, or the first of several."""
    return tensors if isinstance(tensors, Tensor) else next(iter(tensors.values()))


def mapped(function: Callable[[Tensor], Tensor], tensors: Tensors) -> Tensors:
    """What a function gives for the tensor, or for each of several."""
    if isinstance(tensors, Tensor):
        return function(tensors)
    return {name: function(each) for name, each in tensors.items()}


@dataclass(frozen=True)
class LayerCall:
    """What one call of a layer took and returned.

    Attributes:
        activations: The first input, led by the rows: what the checks before the first step see.
        inputs: What the layer function gets beside the gradients: the first input, or several tensors by name.
        outputs: The output, or several by name; the layer function gets the gradients of those that have one.
        fault: Why the call cannot be recorded, else an empty string.
        rows: The row of each entry of the inputs, of nested tensors; None: rows lead.
    """

    activations: Any = None
    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    fault: str = ""
    rows: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether an output is part of a graph."""
        outputs = self.outputs if isinstance(self.outputs, dict) else {"": self.outputs}
        return any(output.requires_grad for output in outputs.values())


CallReader = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], LayerCall]
_READERS: dict[type[nn.Module], CallReader] = {}


def register_call(*types: type[nn.Module]) -> Callable[[CallReader], CallReader]:
    """Registers the function that reads the calls of layers with several inputs or outputs.

    It gets the module, its arguments, its keyword arguments and its output.
    """

    def register(reader: CallReader) -> CallReader:
        for kind in types:
            _READERS[kind] = reader
        return reader

    return register


def layer_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
    """Reads a call; without a function of its own, a layer has one input and one output."""
    for kind in type(module).__mro__:
        if kind in _READERS:
            return _READERS[kind](module, args, kwargs, output)
    x = first_input(args, kwargs)
    if is_jagged(x) and is_jagged(output):
        if not (is_led(x) and is_led(output)):
            return LayerCall(fault="the rows of its nested input are not right before their entries")
        return LayerCall(x.detach().to_padded_tensor(0), values_of(x.detach()), output, rows=rows_of(x))
    if isinstance(x, Tensor) and isinstance(output, Tensor):
        return LayerCall(x, x, output)
    return LayerCall(x, fault="its input or output is not a single tensor")


def has_one_input(module: nn.Module) -> bool:
    """Whether a layer has one input and one output, and no function of its own that reads its calls."""
    return not any(kind in _READERS for kind in type(module).__mro__)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The activations of a layer: its first argument."""
    return args[0] if args else next(iter(kwargs.values()), None)
