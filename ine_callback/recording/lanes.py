"""One lane for each optimizer of a training: the passes that wait for its step, and what becomes of their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ine_callback.capture import Block
from ine_callback.optimizers.clipping import Clipping
from ine_callback.optimizers.joint import AnyOptimizer, JointOptimizer, each_of
from ine_callback.recording.observations import Pass, Pending


class Lane:
    """An optimizer, with its blocks' parts of the backward passes.

    Args:
        optimizer: The optimizer.

    Attributes:
        optimizer: The same.
        clipping: What becomes of its parameters' gradients between backward pass and step.
        pending: The passes that wait for its step.
        stepped: Whether it has ever stepped.
        unused: Numbers of the passes of a batch whose gradients were removed before it took them, when they last came.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.clipping, self.pending = optimizer, Clipping(optimizer), Pending()
        self.stepped, self.unused = False, set[int]()

    def change(self, unscale: Tensor | None, last: bool) -> bool:
        """Measures what was done to the gradients since the backward pass; False if they are all zero now.

        Args:
            unscale: Factor that undoes the scaling of the loss, if it is scaled.
            last: Whether the optimizer uses them now; else a further pass adds to them.
        """
        scale = getattr(self.optimizer, "grad_scale", None)
        with torch.no_grad():
            before = 1.0 if unscale is None or not last else unscale
            change = self.clipping.change(before, 1.0 if scale is None or not last else 1.0 / scale)
        if change is None:
            return True
        if not last and change.zeroed():
            return False
        self.pending.change(change)
        return True

    def take(self) -> list[Pass]:
        """The pending passes, which its step has taken."""
        self.stepped = True
        self.clipping.forget()
        taken = self.pending.take()
        self.unused.difference_update(one.number for one in taken)
        return taken

    def discard(self) -> list[Block]:
        """Forgets the pending passes; returns their blocks."""
        discarded = self.pending.take()
        self.unused.update(one.number for one in discarded)
        self.clipping.forget()
        return [block for one in discarded for block in one.blocks]


def lanes_of(optimizer: AnyOptimizer) -> tuple[Lane, ...]:
    """A lane for each optimizer that there is."""
    return tuple(Lane(one) for one in each_of(optimizer))


def parted(one: Pass, lanes: Sequence[Lane], optimizer: AnyOptimizer) -> Iterator[tuple[Lane, Pass]]:
    """A pass as each optimizer takes it: its own blocks. Without blocks (rows are counted alone) all take it."""
    if not isinstance(optimizer, JointOptimizer):
        yield lanes[0], one
    elif not one.blocks:
        yield from ((lane, one.only(())) for lane in lanes)
    else:
        places = [optimizer.place(block.parameters[0]) for block in one.blocks]
        for k, lane in enumerate(lanes):
            if own := [i for i, place in enumerate(places) if place == k]:
                yield lane, one.only(own)
