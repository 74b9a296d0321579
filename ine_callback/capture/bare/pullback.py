"""Gradients of rows, pulled back through operations on a parameter by autograd's own formulas."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ine_callback.capture.bare.layouts import summed_to
from ine_callback.capture.per_sample_gradients import Lookup
from ine_callback.capture.readable_nodes import is_readable
from ine_callback.capture.row_losses import signed

CAST = "ToCopyBackward0"  # autocast's; not a difference between two uses
RESHAPES = {f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Alias", "Clone")}
RESHAPES |= {f"SqueezeBackward{k}" for k in range(4)} | {CAST}
_SCALINGS = {"MulBackward0", "DivBackward0", "NativeDropoutBackward0"}
PARTS = {"SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"}
_TORCHS_OWN = re.compile(r"[A-Z]\w*Backward\d+")  # whose formulas compute and do nothing else
# so do these functions of torch.autograd.Function, by their module and name
ONLY_COMPUTE = {f"peft.tuners.loha.layer.{name}" for name in ("HadaWeight", "HadaWeightCP")}


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

    @property
    def is_scaling(self) -> bool:
        """Whether its formula multiplies entries by numbers that have no gradient themselves."""
        others = [below for below, _ in self.node.next_functions if below is not None]
        return self.name in _SCALINGS and len(others) == 1

    @property
    def is_computed(self) -> bool:
        """Whether its formula can be called again: torch's own, with all that it needs.

        The backward pass of a ``torch.autograd.Function`` may do more than compute: reentrant checkpoints write
        gradients, tensor parallelism communicates. So only those are called that are known (:data:`ONLY_COMPUTE`).
        """
        own = bool(_TORCHS_OWN.fullmatch(self.name)) or _known_function(self.node) is not None
        return own and is_readable(self.node)


def _known_function(node: Any) -> Any:
    """The ``torch.autograd.Function`` of a node, if its backward pass is known to do nothing but compute; else None."""
    function = getattr(type(node), "_forward_cls", None)
    known = function is not None and f"{function.__module__}.{function.__qualname__}" in ONLY_COMPUTE
    return function if known else None


def called(node: Any, gradient: Tensor, output: int, index: int) -> Tensor:
    """The gradient of one input of an operation, by autograd's own formula."""
    function = _known_function(node)
    if function is not None:  # of one output
        found = function.backward(node, gradient)
    else:
        found = node(*(gradient if k == output else None for k in range(len(node._input_metadata))))
    found = found[index] if isinstance(found, tuple) else found
    if found is None:
        raise Unrecognised(f"{node.name()} has no gradient for it")
    return found  # type: ignore[no-any-return]


def pulled(step: Step, output: int, gradients: Tensor) -> Tensor:
    """Rows' gradients [b, ...] of an output of a step as those of its input [b, *step.shape]."""
    rows = len(gradients)
    if step.name in RESHAPES:
        return gradients.reshape(rows, *step.shape)
    with _without_advice():
        gradients = torch.vmap(lambda each: called(step.node, each, output, step.index))(gradients)
    below, place = step.node.next_functions[step.index]
    if gradients.is_complex() and not below._input_metadata[place].dtype.is_complex:
        gradients = gradients.real
    return summed_to(gradients, step.shape)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """vmap warns of operations that it runs row by row, as torch itself begins."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


def looked_up(node: Any, ids: Tensor, gradients: Tensor) -> Lookup:
    """Gradients [b, P, E] of entries [b, P] of an embedding table."""
    if node._saved_scale_grad_by_freq:
        raise Unrecognised("an embedding whose gradient is scaled by frequency")
    return Lookup(
        ids, gradients * (ids != signed(node._saved_padding_idx))[..., None], node._saved_weight_sym_argsize_0
    )


def outside(step: Step, above: Step) -> tuple[int, tuple[int, int]]:
    """The dimension of which a step takes a part, and what it leaves out before and behind that."""
    assert step.name in PARTS
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
