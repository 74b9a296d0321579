"""The backward passes of a batch: which of them add to a parameter's ``grad``, and whether that is still there.

Adversarial examples, gradient penalties and second closure calls differentiate more than the loss of the step. What
``torch.autograd.grad`` takes never reaches ``grad``; what an inner ``backward`` left there, ``zero_grad`` throws away.
Both are told in Python, without a look at any value, but for zeros that somebody wrote into gradients in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


def counts(parameter: nn.Parameter) -> bool:
    """Whether the backward pass that runs right now adds to the parameter's ``grad``."""
    if hasattr(parameter, "full_tensor"):  # a part of it, by FSDP2: what the pass uses is another tensor
        return True
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # autograd.grad by this very parameter
        return False


def unused(module: nn.Module) -> set[str]:
    """Names of the module's own trainable parameters that the running pass adds nothing to."""
    own = module._parameters.items()
    return {name for name, p in own if p is not None and p.requires_grad and not counts(p)}


class Passes:
    """Follows the backward passes of a step.

    Args:
        over: Called when a pass is over, before anybody else sees its gradients.

    Attributes:
        count: Passes of the present batch so far.
        lost: Passes of the batch so far whose gradients were thrown away.
    """

    def __init__(self, over: Callable[[], None]) -> None:
        self._told, self._running = over, False
        self._touched: set[nn.Parameter] = set()
        self._left: list[tuple[nn.Parameter, ref[Tensor], int]] = []
        self.count = self.lost = 0

    def start_batch(self) -> None:
        self._running, self.count, self.lost = False, 0, 0

    def touch(self, parameters: Iterable[nn.Parameter], begin: Callable[[], None]) -> None:
        """Called in a pass with parameters that it adds to; ``begin`` is called first where the pass is a new one."""
        if not self._running:  # passes inside of one, of reentrant checkpoints, are parts of it
            begin()
            self._running, self._left, self._touched = True, [], set()
            self.count += 1
            torch.autograd.Variable._execution_engine.queue_callback(self._over)
        self._touched.update(parameters)

    def _over(self) -> None:
        """The pass is over: remembers which gradients it left."""
        self._running = False
        self._left = [(p, ref(p.grad), p.grad._version) for p in self._touched if p.grad is not None]
        self._told()

    def gone(self) -> bool:
        """Whether none of the gradients that the last pass left is there any more; called in the next one."""
        if not self._left or any(_unchanged(p.grad, grad, seen) for p, grad, seen in self._left):
            return False
        written = [p.grad for p, _, _ in self._left if p.grad is not None]  # in place: zeros, or clipped
        return not any(bool(grad.any()) for grad in written)


def _unchanged(grad: Tensor | None, before: ref[Tensor], version: int) -> bool:
    """Whether a gradient is the tensor that it was, and nobody has written to it."""
    return grad is not None and before() is grad and grad._version == version
