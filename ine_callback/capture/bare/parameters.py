"""Hooks on the operations that use bare parameters, set when the loss is known; they change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ine_callback.capture.attributes import own_parameters
from ine_callback.capture.bare.layouts import RowLayout
from ine_callback.capture.bare.uses import Graph, Unrecognised, Use
from ine_callback.capture.passes import Call, adds_to_grad
from ine_callback.capture.per_sample_gradients import GradSample


class Layers(Protocol):
    """What is asked of the hooks of layers, :class:`~ine_callback.capture.hooks.Capture`."""

    active: bool
    rows: int
    every_pass: bool
    calls: dict[nn.Module | nn.Parameter, int]
    receive: Callable[[nn.Module, dict[str, GradSample]], None]

    def called(self, what: nn.Module | nn.Parameter) -> Call: ...

    def received(self, what: nn.Module | nn.Parameter, call: Call, counts: bool) -> bool: ...

    def unscaled(self, output_grads: Tensor) -> Tensor: ...

    def lost(self, what: nn.Module | nn.Parameter, name: str, reason: str) -> None: ...

    def give_up(self, what: nn.Module | nn.Parameter, error: Exception) -> None: ...


class BareParameters:
    """The parameters whose rows' gradients are read at the operations that use them.

    Args:
        capture: The hooks of layers; what these record is left to them.
        module: The model.
        layers: Patterns of the names of modules whose own parameters may be read; None: all.
        without: Modules whose parameters are not: compiled ones.

    Attributes:
        layouts: Of each parameter, where the rows are in the output of each kind of use; none until
            :func:`.find_layouts` has found them.
    """

    def __init__(
        self, capture: Layers, module: nn.Module, layers: Sequence[str] | None, without: Iterable[nn.Module]
    ) -> None:
        self._capture, without = capture, set(without)
        self._owners: dict[nn.Parameter, tuple[nn.Module, str]] = {}
        self._all: dict[nn.Parameter, list[nn.Module]] = {}
        self._names = {p: name for name, p in module.named_parameters()}
        for name, child in module.named_modules():
            for local, p in own_parameters(child).items():
                self._all.setdefault(p, []).append(child)
                if child not in without and (layers is None or any(fnmatchcase(name, one) for one in layers)):
                    self._owners.setdefault(p, (child, local))
        self.layouts: dict[nn.Parameter, Mapping[tuple[object, ...], RowLayout]] = {}
        self._watched: dict[tuple[object, ...], RemovableHandle] = {}

    def open_to(self, called: set[nn.Module]) -> list[nn.Parameter]:
        """Trainable parameters that no layer records whose call is known."""
        return [
            p
            for p in self._owners
            if p.requires_grad and p.numel() and not p.is_complex() and not called.intersection(self._all[p])
        ]

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters that are read, by name."""
        return {self._names[p]: p for p in self.layouts}

    def takes(self, module: nn.Module) -> bool:
        """Whether one of a module's own parameters is read here."""
        return any(p in self.layouts for p in own_parameters(module).values())

    def refuse(self, names: Iterable[str]) -> None:
        """Reads no more what is named as left out."""
        for name, p in self.named().items():
            if name in names:
                del self.layouts[p]

    def drop(self, parameter: nn.Parameter, reason: str) -> None:
        """Ignores a parameter from now on; what it contributed to this batch may be incomplete."""
        if self.layouts.pop(parameter, None) is not None:
            self._capture.lost(parameter, self._names[parameter], reason)

    def release(self) -> None:
        """Removes the hooks, and lets go of the graphs."""
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()

    def see(self, loss: Tensor) -> None:
        """Sets the hooks, in the graph of a loss that is about to be differentiated."""
        capture = self._capture
        live = {module for module, calls in capture.calls.items() if isinstance(module, nn.Module) and calls}
        wanted = [p for p in self.open_to(live) if p in self.layouts]
        if not wanted or loss.grad_fn is None:
            return
        graph = Graph(loss.grad_fn)
        for p in wanted:
            known = self.layouts[p]
            try:
                for use in graph.uses(p, lambda use, known=known: self._ends(use, known)):  # type: ignore[misc]
                    self._watch(use, known[use.kind])
            except Unrecognised as error:
                self.drop(p, f"it is used by {error} in training, otherwise than in the check before the first step")

    def _ends(self, use: Use, known: Mapping[tuple[object, ...], RowLayout]) -> bool:
        layout = known.get(use.kind)
        if layout is None or not use.is_readable:
            return False
        if not layout.fits(use.output, self._capture.rows):
            raise Unrecognised(f"{use.last.name} of shape {tuple(use.output)} for {self._capture.rows} rows")
        return True

    def _watch(self, use: Use, layout: RowLayout) -> None:
        key = (use.parameter, use.last.node, use.last.index, *((step.node, step.index) for step in use.steps))
        if key in self._watched:  # two passes through one graph
            return
        call = self._capture.called(use.parameter)

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            if grads[0] is not None:
                self._backward(use, layout, call, grads[0])

        self._watched[key] = use.last.node.register_prehook(hook)

    def _backward(self, use: Use, layout: RowLayout, call: Call, output_grads: Tensor) -> None:
        capture, parameter = self._capture, use.parameter
        if not capture.active or parameter not in self.layouts:
            return
        try:
            if not capture.received(parameter, call, capture.every_pass or adds_to_grad(parameter)):
                return
            with torch.no_grad(), torch.autocast(output_grads.device.type, enabled=False):
                owner, name = self._owners[parameter]
                output_grads = capture.unscaled(output_grads)
                capture.receive(owner, {name: use.grad_sample(output_grads, layout, capture.rows)})
        except Unrecognised as error:
            self.drop(parameter, f"it is used in a way from which no rows' gradients can be read: {error}")
        except Exception as error:  # never raised into the training's backward pass
            capture.give_up(parameter, error)
