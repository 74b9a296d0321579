"""The backward passes of a batch: which of them add to a parameter's ``grad``, and whether that is still there.

Adversarial examples, gradient penalties and second closure calls differentiate more than the loss of the step.
Gradients of ``torch.autograd.grad`` never reach ``grad``; ``zero_grad`` removes what an inner ``backward`` left there.
Both are recognised without synchronising with the device. Only gradients that were changed in place need their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


@dataclass(slots=True, eq=False)
class Call:
    """One call of a layer, or use of a bare parameter.

    Attributes:
        counts: Whether it adds to gradients, as far as is known.
        rows: The row of each entry of its input, where an index selected them.
        accumulators: The nodes of its parameters in the graph, as far as they are known.
    """

    counts: bool = True
    rows: Tensor | None = None
    accumulators: dict[nn.Parameter, Any] = field(default_factory=dict)

    def follow(self, output: Tensor, wanted: set[nn.Parameter]) -> None:
        """Finds the nodes of these parameters, if four operations lead there from the call's output.

        In a layer's call they do. To look a node up by its parameter takes several times as long.
        """
        level: list[Any] = [output.grad_fn] if output.grad_fn is not None else []  # a layer may return its parameter
        for _ in range(4):
            level = [below for each in level for below, _ in each.next_functions if below is not None]
            mine = [each for each in level if type(each).__name__ == "AccumulateGrad" and each.variable in wanted]
            self.accumulators.update((each.variable, each) for each in mine)
            if len(self.accumulators) == len(wanted):
                break


def adds_to_grad(parameter: nn.Parameter, accumulator: Any = None) -> bool:
    """Whether the backward pass that runs right now adds to the parameter's ``grad``.

    Args:
        parameter: The parameter.
        accumulator: Its node in the graph, if known.
    """
    if type(parameter) is not nn.Parameter and hasattr(parameter, "full_tensor"):  # FSDP2's pass uses another tensor
        return True
    try:
        return torch._C._will_engine_execute_node(accumulator or get_gradient_edge(parameter).node)
    except RuntimeError:  # autograd.grad with respect to this parameter
        return False


def parameters_passed_by(module: nn.Module, call: Call) -> set[str]:
    """Names of the module's own trainable parameters to whose ``grad`` the running pass adds nothing."""
    named, known = module._parameters.items(), call.accumulators
    found = {name for name, p in named if p is not None and p.requires_grad and not adds_to_grad(p, known.get(p))}
    known.clear()  # a call outlives the pass, and nodes cannot be copied where a user copies the module
    return found


class Passes:
    """Follows the backward passes of a step.

    Args:
        on_end: Called when a pass is over, before anybody else sees its gradients.

    Attributes:
        count: Passes of the present batch so far.
        discarded: Passes of the batch so far whose gradients were removed.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end, self._running = on_end, False
        self._touched: set[nn.Parameter] = set()
        self._left: list[tuple[nn.Parameter, ref[Tensor], int]] = []
        self.count = self.discarded = 0

    def start_batch(self) -> None:
        self._running, self.count, self.discarded = False, 0, 0

    def touch(self, parameters: Iterable[nn.Parameter], begin: Callable[[], None]) -> None:
        """Called in a pass with parameters that it adds to. Calls ``begin`` first if the pass is a new one."""
        if not self._running:  # passes inside of a pass (reentrant checkpoints) are parts of it
            begin()
            self._running, self._left, self._touched = True, [], set()
            self.count += 1
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._touched.update(parameters)

    def _end(self) -> None:
        """Remembers which gradients the pass left."""
        self._running = False
        self._left = [(p, ref(p.grad), p.grad._version) for p in self._touched if p.grad is not None]
        self._on_end()

    def gone(self) -> bool:
        """Whether all gradients that the last pass left were removed or zeroed; called when the next one begins."""
        if not self._left or any(_unchanged(p.grad, grad, version) for p, grad, version in self._left):
            return False
        changed = [p.grad for p, _, _ in self._left if p.grad is not None]  # in place: zeroed, or clipped
        return not any(bool(grad.any()) for grad in changed)


_AS_IT_IS = nullcontext()


def plain_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Neither a graph nor autocast; nothing is entered where both are off: it takes as long as a layer's product."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        return _without(device.type)
    return _AS_IT_IS


@contextmanager
def _without(kind: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        yield


def in_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad) runs the layer, with tensors that do not outlive it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _unchanged(grad: Tensor | None, before: ref[Tensor], version: int) -> bool:
    """Whether a gradient is the same tensor as before, and nobody has written to it."""
    return grad is not None and before() is grad and grad._version == version
