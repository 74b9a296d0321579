"""The operations that use a parameter, read off the autograd graph, and the rows' gradients that each of them gives.

From the parameter upwards there are first *steps*, operations on the parameter alone (a slice, a transpose, ``exp``, a
weight computed from it), then the *use*: the operation whose output is led by rows. Its gradient, for each row, is
pulled back through the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback.capture.bare import products
from ine_callback.capture.bare.derivatives import DERIVATIVES, ENTRIES_ALONE
from ine_callback.capture.bare.layouts import RowLayout, pair_layouts, row_layouts
from ine_callback.capture.bare.pullback import (
    CAST,
    PARTS,
    RESHAPES,
    Step,
    Unrecognised,
    called,
    looked_up,
    outside,
    pulled,
)
from ine_callback.capture.per_sample_gradients import GradSample, Lookup, Outer, Vector, row_chunks, widened
from ine_callback.capture.readable_nodes import is_readable

# broadcast operations whose backward formulas leave it to autograd to add up over the broadcast dimensions
_BROADCAST = {f"{name}Backward0" for name in ("Add", "Sub", "Mul", "Div", "Where", "Addcmul", "Lerp")}
_COMMUTATIVE = {"AddBackward0", "MulBackward0"}
_COPIES = {"ExpandBackward0", "RepeatBackward0"}
_TRANSPOSES = {"TBackward0", "TransposeBackward0", "TransposeBackward1", "PermuteBackward0"}
_PLAIN = _TRANSPOSES | PARTS | RESHAPES | _BROADCAST | _COPIES
_OTHERS = ("Select", "Index", "IndexSelect", "Embedding", "Exp", "Sigmoid", "Softplus", "Tanh", "Neg")
_SIMPLE = _PLAIN | {f"{name}Backward0" for name in _OTHERS}
_NUMBERS = 5  # operations on a norm before it meets the tensor that is divided by it
_OF_WEIGHTS = _TRANSPOSES | PARTS | {CAST}  # steps after which a matrix's gradients keep their factors


@dataclass(frozen=True)
class Use:
    """A use of a parameter: the last operation, and the steps before it, from the parameter upwards."""

    parameter: nn.Parameter
    last: Step
    steps: tuple[Step, ...] = ()

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two uses have in common whose outputs have the rows in the same place.

        A weight that is scaled by constants stays where it is: dropout of weights comes in training mode alone.
        """
        above = [step.node._input_metadata[0].shape for step in self.steps]
        scaled = {k for k, step in enumerate(self.steps) if step.is_scaling and step.shape == above[k]}
        names = [step.name for k, step in enumerate(self.steps) if step.name != CAST and k not in scaled]
        names += [self.last.name]
        place = 0 if self.last.name in _COMMUTATIVE else self.last.index
        return (*names, place, len(self.output))

    @property
    def computes(self) -> bool:
        """Whether steps compute another tensor from the parameter, in which rows could have a part."""
        return any(step.name not in _SIMPLE for step in self.steps)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all that is computed from the parameter alone."""
        return tuple(tuple(step.shape) for step in (*self.steps, self.last))

    @property
    def output(self) -> torch.Size:
        """Shape of the last operation's output."""
        shape: torch.Size = self.last.node._input_metadata[0].shape
        return shape

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
        return self._is_plain and (self.is_bias or is_readable(self.last.node))

    @property
    def _is_plain(self) -> bool:
        """Whether its output has numbers as sizes: no nested tensor."""
        return all(type(size) is int for size in self.output)

    @property
    def unusual(self) -> str:
        """Name of the operation that makes the use a special one: the first that computes something."""
        return self.computing or self.last.name.removeprefix("torch::autograd::")

    @property
    def computing(self) -> str:
        """Name of the first operation that computes something; empty where none does."""
        names = [step.name for step in (*self.steps, self.last)]
        return next((name for name in names if name not in _PLAIN), "").removeprefix("torch::autograd::")

    def layouts(self, rows: int) -> list[RowLayout]:
        """Where the rows may be in the output; nowhere if the operation can be no use."""
        if not self.is_readable:
            return []
        if self._is_weight:
            return products.layouts(self.last, self.output, rows)
        if self.is_derivative:
            found = row_layouts(self.output, self.output[1:], rows) if all(s.name == CAST for s in self.steps) else []
            return [one for one in found if one.place == "alone" or self.last.name not in ENTRIES_ALONE]
        if self._is_channel_bias:
            return [RowLayout(0, "alone")] if self.output[0] == rows else []
        return row_layouts(self.output, self.last.shape, rows) if self._is_broadcast else []

    @property
    def _is_channel_bias(self) -> bool:
        """Whether it is the bias of a convolution."""
        return self.last.name == "ConvolutionBackward0" and self.last.index == 2

    def pairs(self, entries: int) -> list[RowLayout]:
        """The layout in which the output's first two dimensions are entries; none if they are not."""
        return pair_layouts(self.output, self.last.shape, entries) if self._is_broadcast and self.is_readable else []

    @property
    def _is_weight(self) -> bool:
        """Whether it is the matrix of a product, a convolution's kernel or a table."""
        known = (products.is_product, products.is_convolution, products.is_table, products.is_grouped)
        return any(is_one(self.last) for is_one in known)

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

    @property
    def rearranges(self) -> bool:
        """Whether the last operation moves entries and computes nothing."""
        return self.last.name in _TRANSPOSES | PARTS | RESHAPES | _COPIES

    def is_step(self) -> bool:
        """Whether the last operation can be one of the steps."""
        return self._is_plain and self.last.is_computed and not self._is_sum

    @property
    def _is_sum(self) -> bool:
        """Whether numbers alone are left of a larger parameter, and several operations on them: a penalty's sum."""
        numbers = [math.prod(step.shape) == 1 for step in (*self.steps, self.last)][-_NUMBERS:]
        return self.parameter.numel() > 1 and len(numbers) == _NUMBERS and all(numbers)

    def grad_sample(self, output_grads: Tensor, layout: RowLayout, rows: int) -> GradSample:
        """The rows' gradients of the parameter, from the gradient of the last operation's output."""
        if self.is_derivative:
            _, derivative = DERIVATIVES[self.last.name]
            return derivative(self.last.node, output_grads, layout, rows, self.parameter.shape)
        if self._is_weight:
            found = self._of_weight(output_grads, layout, rows)
            if self._keeps_factors:
                return found
            of_rows: Callable[[slice], Tensor] = found.gradient
        elif self._is_channel_bias:
            of_rows = widened(output_grads).flatten(2).sum(2).__getitem__
        else:
            of_rows = layout.summed(self._broadcast(widened(output_grads)), rows, self.last.shape).__getitem__
        largest = max(math.prod(step.shape) for step in (*self.steps, self.last))
        gradients = torch.cat([self._pulled(of_rows(some)) for some in row_chunks(rows, largest)])
        if self._looks_up:
            ids = self.steps[0].node._saved_indices.reshape(1, -1).expand(rows, -1)
            return looked_up(self.steps[0].node, ids, gradients.reshape(rows, ids.shape[1], -1))
        return Vector(gradients.reshape(rows, -1))

    @property
    def _looks_up(self) -> bool:
        """Whether entries are looked up once for all rows, before anything else is done with them."""
        return bool(self.steps) and self.steps[0].name == "EmbeddingBackward0"

    def _pulled(self, gradients: Tensor) -> Tensor:
        """Rows' gradients of what the last operation gets as those of the parameter, or of what was looked up."""
        gradients = gradients.reshape(len(gradients), *self.last.shape)
        for step, above in self._downwards():
            if not (self._looks_up and step is self.steps[0]):
                gradients = pulled(step, above.output, gradients)
        return gradients

    @property
    def _keeps_factors(self) -> bool:
        """Whether a weight is the parameter itself, or a part of it: its gradients then keep their factors."""
        steps, dims = [step for step in self.steps if step.name != CAST], len(self.parameter.shape)
        if products.is_product(self.last) and dims == 2:
            return len(self.last.shape) == 2 and all(step.name in _OF_WEIGHTS for step in steps)
        if products.is_grouped(self.last):
            return all(step.name == "TransposeBackward0" for step in steps)
        return not steps and (dims == 2 or not products.is_table(self.last))

    def takes(self, rows: int) -> int:
        """Elements of the rows' gradients where a weight computed from the parameter has them formed; else 0."""
        if products.is_grouped(self.last):
            return self.output[0] * math.prod(self.last.shape[:2])
        formed = not self._keeps_factors if self._is_weight else self.computes and not self._looks_up
        return rows * self.parameter.numel() if formed else 0

    def _of_weight(self, output_grads: Tensor, layout: RowLayout, rows: int) -> Outer | Lookup:
        """The rows' gradients of the last operation's weight; of the parameter itself where they keep their factors."""
        if products.is_grouped(self.last):
            found = products.grouped(self.last, output_grads, rows)  # of a weight [G, I, O]
            return found.transposed() if any(step.name in _TRANSPOSES for step in self.steps) else found
        if products.is_convolution(self.last):
            return products.convolved(self.last, output_grads)
        if products.is_table(self.last):
            return products.entries(self.last, output_grads, layout, rows)
        left, right = products.factors(self.last, output_grads, layout, rows)  # of a weight [I, O]
        for step, above in self._downwards() if self._keeps_factors else ():
            if step.name in _TRANSPOSES:  # of two dimensions
                left, right = right, left
            elif step.name in PARTS:
                dim, around = outside(step, above)
                left, right = (left, F.pad(right, around)) if dim else (F.pad(left, around), right)
        return Outer(right, left)

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
        found = called(node, output_grads, 0, index)
        if found.shape != output_grads.shape:
            raise Unrecognised(f"{node.name()} adds its gradient up over the rows")
        return found
