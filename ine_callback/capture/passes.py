"""The backward passes of a batch: which of them add to a parameter's ``grad``, and whether that is still there.

Adversarial examples, gradient penalties and second closure calls differentiate more than the loss of the step.
Gradients of ``torch.autograd.grad`` never reach ``grad``; ``zero_grad`` removes what an inner ``backward`` left there.
Both are recognised without synchronising with the device. Only gradients that were changed in place need their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


class Call:
    """One call of a layer, or use of a bare parameter.

    Attributes:
        counts: Whether it adds to gradients, as far as is known.
        rows: The row of each entry of its input, where an index selected them.
    """

    counts = True
    rows: Tensor | None = None


def adds_to_grad(parameter: nn.Parameter) -> bool:
    """Whether the backward pass that runs right now adds to the parameter's ``grad``."""
    if hasattr(parameter, "full_tensor"):  # sharded by FSDP2: the pass uses another tensor
        return True
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # autograd.grad with respect to this parameter
        return False


def parameters_passed_by(module: nn.Module) -> set[str]:
    """Names of the module's own trainable parameters to whose ``grad`` the running pass adds nothing."""
    named = module._parameters.items()
    return {name for name, p in named if p is not None and p.requires_grad and not adds_to_grad(p)}


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
