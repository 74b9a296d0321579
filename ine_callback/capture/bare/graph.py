"""The graph of a loss, read upwards from a parameter: what each operation on it is, a layer's own, a use, or neither.

A layer's own call is recorded by its hook. Its parameters may have further uses: a weight that is also the head's
(``F.linear(x, embed.weight)``), the derivative of the layer in a gradient penalty (``create_graph=True``). What is
neither is *apart*: a penalty on weights, which belongs to no row, or an operation that is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ine_callback.capture.bare.pullback import Step, Unrecognised
from ine_callback.capture.bare.uses import Use
from ine_callback.capture.layers import given_parameters
from ine_callback.capture.marks import MarkedCall, call_of

_MOST = 1000  # operations that are followed from one on a parameter


@dataclass(frozen=True)
class Apart:
    """An operation on a parameter from which no use was recognised.

    Attributes:
        first: The operation.
        name: Of the one that is not known, which may lie above.
    """

    first: Step
    name: str

    @property
    def kind(self) -> tuple[Any, ...]:
        """What operations of one term of a loss have in common."""
        return self.first.name, self.first.index, self.name


@dataclass
class Above:
    """What there is above a parameter beside a layer's own calls."""

    uses: list[Use] = field(default_factory=list)
    apart: list[Apart] = field(default_factory=list)


class Graph:
    """The graph of a loss, read upwards: which operations use the output of each node.

    Args:
        root: The loss's node.
        unread: Layers whose calls no hook records; their operations are nobody's own.
    """

    def __init__(self, root: Any, unread: Collection[nn.Module] = ()) -> None:
        self._consumers: dict[Any, list[tuple[Any, int, int]]] = {}
        self._root, self._unread = root, unread
        seen, waiting = {root}, [root]
        while waiting:
            node = waiting.pop()
            for index, (below, output) in enumerate(node.next_functions):
                if below is not None:
                    self._consumers.setdefault(below, []).append((node, index, output))
                    if below not in seen:
                        seen.add(below)
                        waiting.append(below)

    @property
    def half(self) -> bool:
        """Whether half precision takes part somewhere."""
        halves = (torch.float16, torch.bfloat16)
        return any(one.dtype in halves for node in self._consumers for one in node._input_metadata)

    @cached_property
    def _calls(self) -> list[tuple[Any, MarkedCall]]:
        """The nodes of recorded layers' outputs, with their calls."""
        calls = ((node, call_of(node)) for node in (self._root, *self._consumers))
        return [(node, call) for node, call in calls if call is not None and call.module not in self._unread]

    @cached_property
    def _outputs(self) -> set[Any]:
        return {node for node, _ in self._calls}

    @cached_property
    def _own(self) -> dict[Any, MarkedCall]:
        """The nodes of recorded layers' own operations."""
        own = dict[Any, MarkedCall]()
        for output, call in self._calls:
            waiting = [] if output in call.begins else [output]
            own.update(dict.fromkeys(waiting, call))
            while waiting:
                for below, _ in waiting.pop().next_functions:
                    if below is not None and below not in own and below not in call.begins:
                        own[below] = call
                        waiting.append(below)
        return own

    def above(self, parameter: nn.Parameter, ends: Callable[[Use], bool]) -> Above:
        """All uses of a parameter but those in recorded layers' own calls, and what is apart from them.

        Args:
            parameter: The parameter.
            ends: Whether an operation is a use; else it is taken as a step.

        Raises:
            Unrecognised: If an operation that is not known shares its first step with a use.
        """
        out, leaf = Above(), get_gradient_edge(parameter).node
        for consumer, index, output in self._consumers.get(leaf, []):
            use = Use(parameter, Step(consumer, index, output, leaf._input_metadata[output].shape))
            found = _Paths()
            self._climb(use, ends, found)
            if not found.unknown:
                out.uses += found.uses
            elif found.uses or found.own:
                raise Unrecognised(found.unknown)
            else:
                out.apart.append(Apart(use.last, found.unknown))
        return out

    def uses(self, parameter: nn.Parameter, ends: Callable[[Use], bool]) -> list[Use]:
        """All uses of a parameter, which has no others.

        Raises:
            Unrecognised: If an operation is neither a use nor a step.
        """
        found = self.above(parameter, ends)
        if found.apart:
            raise Unrecognised(found.apart[0].name)
        return found.uses

    def _climb(self, use: Use, ends: Callable[[Use], bool], found: _Paths) -> None:
        node, call = use.last.node, self._own.get(use.last.node)
        found.climbed += 1
        if call is not None and _has(call.module, use.parameter):
            # a step inside of a call (the weight transposed) has others' uses above it, too: the layer's derivative;
            # what the call computes holds rows, and an unrolled LSTM has thousands of paths through it
            found.own = True
            if node not in self._outputs and use.rearranges and use.is_step():
                self._further(use, ends, found)
        elif ends(use):
            found.uses.append(use)
        elif found.climbed < _MOST and use.is_step() and not self._enters(use, call):
            self._further(use, ends, found)
        else:
            found.unknown = found.unknown or use.unusual

    def _enters(self, use: Use, call: MarkedCall | None) -> bool:
        """Whether an operation takes what a layer is called with, rather than a weight computed for it."""
        return call is not None and use.steps[-1:] != () and use.steps[-1].node in call.begins

    def _further(self, use: Use, ends: Callable[[Use], bool], found: _Paths) -> None:
        node = use.last.node
        if node not in self._consumers:
            found.unknown = found.unknown or use.computing or "the loss itself"
        for consumer, index, output in self._consumers.get(node, []):
            step = Step(consumer, index, output, node._input_metadata[output].shape)
            self._climb(Use(use.parameter, step, (*use.steps, use.last)), ends, found)


def _has(module: nn.Module, parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in given_parameters(module).values())


@dataclass
class _Paths:
    """What was found on the paths that begin with one operation on a parameter."""

    uses: list[Use] = field(default_factory=list)
    own: bool = False
    unknown: str = ""
    climbed: int = 0
