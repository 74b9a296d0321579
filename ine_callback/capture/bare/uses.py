"""The operations that use a parameter, read off the autograd graph, and the rows' gradients that each of them gives.

From the parameter upwards there are first *steps*, operations on the parameter alone (a slice, a transpose, ``exp``),
then the *use*: the operation whose output is led by rows. Its gradient, for each row, is pulled back through the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.bare.derivatives import DERIVATIVES, ENTRIES_ALONE
from ine_callback.capture.bare.layouts import RowLayout, pair_layouts, row_layouts, summed_to
from ine_callback.capture.per_sample_gradients import GradSample, Lookup, Outer, Vector, widened
from ine_callback.capture.row_losses import signed

_CAST = "ToCopyBackward0"  # autocast's; not a difference between two uses
# broadcast operations whose backward formulas leave it to autograd to add up over the broadcast dimensions
_BROADCAST = {f"{name}Backward0" for name in ("Add", "Sub", "Mul", "Div", "Where", "Addcmul", "Lerp")}
_COPIES = {"ExpandBackward0", "RepeatBackward0"}
_PRODUCTS = {"MmBackward0": (1, "self"), "AddmmBackward0": (2, "mat1")}  # the weight's place, and the activations
_RESHAPES = {f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Alias", "Clone")}
_RESHAPES |= {f"SqueezeBackward{k}" for k in range(4)} | {_CAST}
_TRANSPOSES = {"TBackward0", "TransposeBackward0", "TransposeBackward1", "PermuteBackward0"}
_PARTS = {"SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"}
_OTHERS = ("Select", "Index", "IndexSelect", "Embedding", "Exp", "Sigmoid", "Softplus", "Tanh", "Neg")
_STEPS = _BROADCAST | _COPIES | _RESHAPES | _TRANSPOSES | _PARTS | {f"{name}Backward0" for name in _OTHERS}
_OF_WEIGHTS = _TRANSPOSES | _PARTS | {_CAST}  # steps before a matrix product
# torch 2.6 to 2.12 do not tell what activation checkpointing saved, so that nothing saved is read
SAVED_IS_READ = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")


class Unrecognised(Exception):
    """A use of a parameter from which rows' gradients cannot be read; the message names the operation."""


@dataclass(frozen=True)
class Step:
    """An operation on a graph, seen from one of its inputs.

    Attributes:
        node: Its node.
        index: Which input.
        output: Which output of the node below that input is.
        shape: Its shape.
    """

    node: Any
    index: int
    output: int
    shape: torch.Size

    @property
    def name(self) -> str:
        name: str = self.node.name()
        return name


@dataclass(frozen=True)
class Use:
    """A use of a parameter: the last operation, and the steps before it, from the parameter upwards."""

    parameter: nn.Parameter
    last: Step
    steps: tuple[Step, ...] = ()

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two uses have in common whose outputs have the rows in the same place."""
        names = [step.name for step in (*self.steps, self.last) if step.name != _CAST]
        return (*names, self.last.index, len(self.output))

    @property
    def output(self) -> torch.Size:
        """Shape of the last operation's output."""
        shape: torch.Size = self.last.node._input_metadata[0].shape
        return shape

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product with the parameter as weight."""
        return self.last.name in _PRODUCTS and self.last.index == _PRODUCTS[self.last.name][0]

    @property
    def is_derivative(self) -> bool:
        """Whether it is a layer's derivative by its input, with the parameter as weight."""
        return self.last.name in DERIVATIVES and self.last.index == DERIVATIVES[self.last.name][0]

    @property
    def is_bias(self) -> bool:
        """Whether it is the addition to a matrix product."""
        return self.last.name == "AddmmBackward0" and self.last.index == 0

    @property
    def is_readable(self) -> bool:
        """Whether all that its gradients are computed from can be read; of a bias that is nothing saved."""
        return self.is_bias or is_readable(self.last.node)

    def layouts(self, rows: int) -> list[RowLayout]:
        """Where the rows may be in the output; nowhere if the operation can be no use."""
        if not self.is_readable:
            return []
        if self.is_product:
            known = len(self.parameter.shape) == 2 and all(step.name in _OF_WEIGHTS for step in self.steps)
            return row_layouts(self.output, self.output[1:], rows) if known else []
        if self.is_derivative:
            found = row_layouts(self.output, self.output[1:], rows) if all(s.name == _CAST for s in self.steps) else []
            return [one for one in found if one.place == "alone" or self.last.name not in ENTRIES_ALONE]
        return row_layouts(self.output, self.last.shape, rows) if self._is_broadcast else []

    def pairs(self, entries: int) -> list[RowLayout]:
        """The layout in which the output's first two dimensions are entries; none if they are not."""
        return pair_layouts(self.output, self.last.shape, entries) if self._is_broadcast and self.is_readable else []

    @property
    def _is_broadcast(self) -> bool:
        """Whether the parameter is broadcast to the output."""
        return self.is_bias or self.last.name in _BROADCAST or self._copies

    @property
    def _copies(self) -> bool:
        """Whether it repeats the parameter where that has a dimension of size one or none."""
        shape = self.last.shape
        pairs = zip(reversed(self.output), reversed(shape), strict=False)
        return self.last.name in _COPIES and all(n in (1, size) for size, n in pairs)

    def is_step(self) -> bool:
        """Whether the last operation can be one of the steps."""
        return self.last.name in _STEPS and is_readable(self.last.node)

    def grad_sample(self, output_grads: Tensor, layout: RowLayout, rows: int) -> GradSample:
        """The rows' gradients of the parameter, from the gradient of the last operation's output."""
        if self.is_product:
            return self._of_product(output_grads, layout, rows)
        if self.is_derivative:
            _, derivative = DERIVATIVES[self.last.name]
            return derivative(self.last.node, output_grads, layout, rows, self.parameter.shape)
        gradients = layout.summed(self._broadcast(widened(output_grads)), rows, self.last.shape)
        for step, above in self._downwards():
            if step is self.steps[0] and step.name == "EmbeddingBackward0":
                return _lookup(step.node, gradients, rows)
            gradients = _pulled(step, above.output, gradients, rows)
        return Vector(gradients.reshape(rows, -1))

    def _downwards(self) -> Iterator[tuple[Step, Step]]:
        """The steps from the last to the first, each with the one above it."""
        chain = (*self.steps, self.last)
        return ((chain[k], chain[k + 1]) for k in reversed(range(len(self.steps))))

    def _broadcast(self, output_grads: Tensor) -> Tensor:
        """The gradient of the broadcast input, before it is added up over the broadcast dimensions."""
        if self._copies:
            return output_grads
        node, index = self.last.node, self.last.index
        if self.is_bias:
            return output_grads * float(node._saved_beta)
        found = _called(node, output_grads, 0, index)
        if found.shape != output_grads.shape:
            raise Unrecognised(f"{node.name()} adds its gradient up over the rows")
        return found

    def _of_product(self, output_grads: Tensor, layout: RowLayout, rows: int) -> GradSample:
        """As of a linear layer: activations and output gradients, for each row with its positions."""
        node = self.last.node
        activations = getattr(node, f"_saved_{_PRODUCTS[node.name()][1]}").detach()
        if not activations.dtype == output_grads.dtype == torch.bfloat16:
            activations, output_grads = widened(activations), widened(output_grads)
        if node.name() == "AddmmBackward0" and node._saved_alpha != 1:
            output_grads = output_grads * node._saved_alpha
        left, right = (layout.split(x, rows).unsqueeze(1) for x in (activations, output_grads))  # weight [I, O]
        for step, above in self._downwards():
            if step.name in _TRANSPOSES:  # of two dimensions
                left, right = right, left
            elif step.name in _PARTS:
                dim, outside = _outside(step, above)
                left, right = (left, F.pad(right, outside)) if dim else (F.pad(left, outside), right)
        return Outer(right, left)


def is_readable(node: Any) -> bool:
    """Whether all that an operation saved can be read a second time.

    What activation checkpointing saved can be read once only, by autograd.
    """
    kind: Any = type(node)
    for name in _saved_by(kind):
        saved = getattr(node, name)
        for each in saved if isinstance(saved, tuple | list) else [saved]:
            if getattr(each, "unpack_hook", "unknown") is not None:
                return False
    return True


@cache
def _saved_by(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _called(node: Any, gradient: Tensor, output: int, index: int) -> Tensor:
    """The gradient of one input of an operation, by autograd's own formula."""
    found = node(*(gradient if k == output else None for k in range(len(node._input_metadata))))
    found = found[index] if isinstance(found, tuple) else found
    if found is None:
        raise Unrecognised(f"{node.name()} has no gradient for it")
    return found  # type: ignore[no-any-return]


def _pulled(step: Step, output: int, gradients: Tensor, rows: int) -> Tensor:
    """Rows' gradients [b, ...] of an output of a step as those of its input [b, *step.shape]."""
    if step.name in _RESHAPES:
        return gradients.reshape(rows, *step.shape)
    gradients = torch.vmap(lambda each: _called(step.node, each, output, step.index))(gradients)
    return summed_to(gradients, step.shape)


def _lookup(node: Any, gradients: Tensor, rows: int) -> Lookup:
    """Gradients [b, *ids, E] of entries that were looked up once for all rows."""
    if node._saved_scale_grad_by_freq:
        raise Unrecognised("an embedding whose gradient is scaled by frequency")
    ids = node._saved_indices.reshape(1, -1)
    output_grads = gradients.reshape(rows, ids.numel(), -1) * (ids != signed(node._saved_padding_idx))[..., None]
    return Lookup(ids.expand(rows, -1), output_grads, node._saved_weight_sym_argsize_0)


def _outside(step: Step, above: Step) -> tuple[int, tuple[int, int]]:
    """The dimension of which a step takes a part, and what it leaves out before and behind that."""
    dim, node, output = signed(step.node._saved_dim) % len(step.shape), step.node, above.output
    whole, taken = step.shape[dim], node._input_metadata[output].shape[dim]
    if step.name == "SliceBackward0":
        start = signed(node._saved_start)
        before = start + whole if start < 0 else start
    elif step.name == "SplitBackward0":
        before = output * node._saved_split_size
    else:
        before = sum(node._saved_split_sizes[:output])
    return dim, (before, whole - taken - before)
