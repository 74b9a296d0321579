"""Several optimizers of one model, seen as one: which of them owns a parameter, and how often each has stepped.

The first optimizer's first parameter group is the reference that rates of other groups are relative to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


class JointOptimizer:
    """Several optimizers with parameters of their own.

    An *update* is what they do between two batches: one step of each, or of some (the generator's at every fifth
    batch), or several of one.

    Args:
        optimizers: The optimizers.

    Attributes:
        each: The optimizers.
        steps: Steps that each has taken.
        summed: Learning rate of each one's first parameter group, summed over its own steps.
        by_turns: Whether they ever took gradients of different backward passes, as the players of a game do.

    Example:
        >>> import torch
        >>> one, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        >>> joint = JointOptimizer([torch.optim.SGD([one], lr=0.1), torch.optim.Adam([other])])
        >>> type(joint.of(other)).__name__, joint.of(torch.nn.Parameter(torch.zeros(1)))
        ('Adam', None)
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.each = tuple(optimizers)
        self.steps, self.summed = [0] * len(self.each), [0.0] * len(self.each)
        self._updates, self._active = 0, [0] * len(self.each)
        self._before = list(self.steps)  # steps before the present update
        self.by_turns = False
        self._took: dict[int, tuple[int, ...]] = {}  # in the present update: optimizer -> passes
        self._players: set[int] = set()  # who took any
        self._owners: dict[nn.Parameter, int] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all, the reference first."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    def place(self, parameter: nn.Parameter) -> int | None:
        """Which optimizer has the parameter, by its place in :attr:`each`; None if none has."""
        if parameter not in self._owners:  # parameters may join later
            self._owners = {
                p: k for k, one in enumerate(self.each) for group in one.param_groups for p in group["params"]
            }
        return self._owners.get(parameter)

    def of(self, parameter: nn.Parameter) -> Optimizer | None:
        """The optimizer that has the parameter; None if none has."""
        place = self.place(parameter)
        return None if place is None else self.each[place]

    def shared(self) -> set[nn.Parameter]:
        """Parameters that two optimizers have."""
        seen: set[nn.Parameter] = set()
        twice: set[nn.Parameter] = set()
        for optimizer in self.each:
            own = {p for group in optimizer.param_groups for p in group["params"]}
            twice |= seen & own
            seen |= own
        return twice

    def count(self, optimizer: Optimizer, passes: Sequence[int] = ()) -> None:
        """One of them has stepped, with the gradients of these backward passes."""
        k = self.each.index(optimizer)
        if passes:
            self._took[k] = (*self._took.get(k, ()), *passes)
        self.steps[k] += 1
        self.summed[k] += float(optimizer.param_groups[0]["lr"])

    def end_update(self) -> None:
        """All steps between two batches were counted."""
        self._updates += 1
        for k, (now, before) in enumerate(zip(self.steps, self._before, strict=True)):
            self._active[k] += now > before
        self._before = list(self.steps)
        self._players |= self._took.keys()
        self.by_turns |= bool(self._took) and (len(set(self._took.values())) > 1 or self._took.keys() != self._players)
        self._took = {}

    def activity(self, optimizer: Optimizer) -> float:
        """The fraction of updates in which an optimizer steps, as it is expected from those so far.

        Example:
            >>> import torch
            >>> one, other = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
            >>> joint = JointOptimizer([one, other])
            >>> for batch in range(9):
            ...     joint.count(one)
            ...     if batch % 5 == 4:
            ...         joint.count(other)
            ...     joint.end_update()
            >>> joint.activity(one), joint.activity(other)
            (1.0, 0.2)
        """
        return (self._active[self.each.index(optimizer)] + 1) / (self._updates + 1)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        counts = {"steps": list(self.steps), "summed": list(self.summed)}
        return counts | {"updates": self._updates, "active": list(self._active), "by_turns": self.by_turns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned."""
        self.steps, self.summed = list(state["steps"]), list(state["summed"])
        self._updates, self._active, self._before = state["updates"], list(state["active"]), list(state["steps"])
        self.by_turns = state["by_turns"]


AnyOptimizer = Optimizer | JointOptimizer


def as_one(optimizer: Optimizer | Sequence[Optimizer]) -> AnyOptimizer:
    """One optimizer as it is, several as a :class:`JointOptimizer`."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    return optimizer[0] if len(optimizer) == 1 else JointOptimizer(optimizer)


def each_of(optimizer: AnyOptimizer) -> tuple[Optimizer, ...]:
    """The optimizers that there are, the reference first."""
    return optimizer.each if isinstance(optimizer, JointOptimizer) else (optimizer,)


def owner_of(optimizer: AnyOptimizer, parameter: nn.Parameter) -> Optimizer | None:
    """The optimizer that answers for a parameter: a single one for all, of several the one that has it."""
    return optimizer.of(parameter) if isinstance(optimizer, JointOptimizer) else optimizer
