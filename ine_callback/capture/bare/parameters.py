"""Hooks on the operations that use bare parameters, set when the loss is known; they change nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ine_callback.capture.attributes import own_parameters
from ine_callback.capture.bare.graph import Apart, Graph
from ine_callback.capture.bare.layouts import RowLayout
from ine_callback.capture.bare.pullback import Unrecognised
from ine_callback.capture.bare.uses import Use
from ine_callback.capture.entries import EntryIndex
from ine_callback.capture.layers import RowMismatch, given_parameters
from ine_callback.capture.passes import Call, adds_to_grad, plain_arithmetic
from ine_callback.capture.per_sample_gradients import GradSample, of_entries
from ine_callback.capture.unfamiliar import Unfamiliar

UNCHECKED = "it is used by {} in training, otherwise than in the check before the first step"
_WATCHED = "ine_callback.uses"  # in the metadata of a node: the uses whose gradients are awaited there


class Layers(Protocol):
    """What is asked of the hooks of layers, :class:`~ine_callback.capture.hooks.Capture`."""

    active: bool
    rows: int
    every_pass: bool
    double_backward: bool
    entries: EntryIndex | None
    unfamiliar: Unfamiliar
    calls: dict[nn.Module | nn.Parameter, int]
    receive: Callable[[nn.Module, dict[str, GradSample]], None]

    def called(self, what: nn.Module | nn.Parameter) -> Call: ...

    def received(self, what: nn.Module | nn.Parameter, call: Call, counts: bool) -> bool: ...

    def unscaled(self, output_grads: Tensor) -> Tensor: ...

    def lost(self, what: nn.Module | nn.Parameter, name: str, reason: str) -> None: ...

    def give_up(self, what: nn.Module | nn.Parameter, error: Exception) -> None: ...


class Observer(Protocol):
    """What is told of operations that belong to no row, or are not known: :class:`~.Verification`."""

    def watch_apart(self, parameter: nn.Parameter, apart: Apart) -> None: ...


class BareParameters:
    """The parameters whose rows' gradients are read at the operations that use them.

    Those of recorded layers are read at their uses outside of the layer's own call.

    Args:
        capture: The hooks of layers; what these record is left to them.
        module: The model.
        layers: Patterns of the names of modules whose own parameters may be read; None: all.
        without: Modules whose parameters are not: compiled ones.

    Attributes:
        layouts: Of each parameter, where the rows are in the output of each kind of use; none until
            :func:`.find_layouts` has found them.
        of_no_row: Of each parameter, the kinds of operations whose gradients belong to no row (a penalty on weights);
            none until :func:`.find_terms_of_no_row` has found them.
        apart: Of each parameter, the kinds of operations that :func:`.find_layouts` did not recognise.
        trusts_entries: Whether uses that entries lead are read without a check, as nothing could be checked.
        unknown: Of each parameter, the name of one of these.
        rejected: Kinds of uses in which no rows were found, so that they are looked for further up.
        beside: Parameters that are read here beside the calls of their layers.
    """

    def __init__(
        self, capture: Layers, module: nn.Module, layers: Sequence[str] | None, without: Iterable[nn.Module]
    ) -> None:
        self._capture, without = capture, set(without)
        self._owners: dict[nn.Parameter, tuple[nn.Module, str]] = {}
        self._givers: dict[nn.Parameter, list[nn.Module]] = {}  # layers whose functions give its gradients
        self._names = {p: name for name, p in module.named_parameters()}
        for name, child in module.named_modules():
            given = given_parameters(child)
            for local, p in own_parameters(child).items():
                self._givers.setdefault(p, []).extend([child] if local in given else [])
                if child not in without and (layers is None or any(fnmatchcase(name, one) for one in layers)):
                    self._owners.setdefault(p, (child, local))
        self.layouts: dict[nn.Parameter, Mapping[tuple[object, ...], RowLayout]] = {}
        self.of_no_row: dict[nn.Parameter, set[tuple[object, ...]]] = {}
        self.trusts_entries = False
        self.beside: set[nn.Parameter] = set()
        self.apart: dict[nn.Parameter, set[tuple[object, ...]]] = {}
        self.unknown: dict[nn.Parameter, str] = {}
        self.rejected: set[tuple[nn.Parameter, tuple[object, ...]]] = set()
        self._left_out: set[nn.Parameter] = set()
        self._handles: list[RemovableHandle] = []
        self._batches = 0

    def called(self, parameter: nn.Parameter, without: Collection[nn.Module]) -> bool:
        """Whether a recorded layer has the parameter."""
        return any(one not in without for one in self._givers[parameter])

    def open_to(self, called: set[nn.Module]) -> list[nn.Parameter]:
        """Trainable parameters that no layer records whose call is known."""
        return [p for p in self.trainable() if not called.intersection(self._givers[p])]

    def may_end(self, use: Use, rows: int) -> bool:
        """Whether a use's output may hold the rows."""
        return (use.parameter, use.kind) not in self.rejected and bool(use.layouts(rows))

    def settle(self) -> None:
        """Reads no parameter of its own of which some operation is neither a use nor of no row."""
        for p in list(self.layouts):
            if p not in self.beside and not self.apart.get(p, set()) <= self.of_no_row.get(p, set()):
                del self.layouts[p]

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters that are read, by name."""
        return {self._names[p]: p for p in self.layouts}

    def takes(self, module: nn.Module) -> bool:
        """Whether one of a module's own parameters is read here alone."""
        return any(p in self.layouts and p not in self.beside for p in own_parameters(module).values())

    def trainable(self) -> list[nn.Parameter]:
        """All trainable parameters that may be read."""
        return [p for p in self._owners if p.requires_grad and p.numel() and not p.is_complex()]

    def refuse(self, names: Iterable[str]) -> None:
        """Reads no more what is named as left out."""
        names = set(names)
        for p, name in self._names.items():
            if name in names:
                self.layouts.pop(p, None)
                self._left_out.add(p)

    def follow(self, module: nn.Module, root: nn.Module) -> list[nn.Parameter]:
        """Takes a module's parameters by the names that they have now in ``root``; returns them."""
        self._names = {p: name for name, p in root.named_parameters()}
        moved = {p: (module, name) for name, p in own_parameters(module).items() if p in self._givers}
        self._owners.update({p: place for p, place in moved.items() if p in self._owners})
        return list(moved)

    def drop(self, parameter: nn.Parameter, reason: str) -> None:
        """Ignores a parameter from now on; what it contributed to this batch may be incomplete."""
        self.layouts.pop(parameter, None)
        if parameter not in self._left_out:
            self._left_out.add(parameter)
            self._capture.lost(parameter, self._names[parameter], reason)

    def release(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._batches += 1

    def see(self, loss: Tensor, observer: Observer | None = None) -> set[nn.Parameter]:
        """Sets the hooks, in the graph of a loss that is about to be differentiated.

        Args:
            loss: The loss.
            observer: Is told of what is apart from all uses, if anybody wants to know.

        Returns:
            Parameters of recorded layers that are also used elsewhere.
        """
        capture = self._capture
        # also layers whose calls do not count so far: an inner pass has been through one that the loss may hold, too
        live = {module for module in capture.calls if isinstance(module, nn.Module)}
        bare = {p for p in self.open_to(live) if p in self.layouts}
        everything = observer is not None or capture.double_backward or self.trusts_entries
        wanted = [p for p in self.trainable() if everything or p in self.layouts]
        if not wanted or loss.grad_fn is None:
            return set()
        graph, elsewhere = Graph(loss.grad_fn), set[nn.Parameter]()
        for p in wanted:
            for use, layout in self._read(graph, p, p in bare, observer):
                self._watch(use, layout)
                if p not in bare:
                    elsewhere.add(p)
        return elsewhere

    def _read(
        self, graph: Graph, p: nn.Parameter, bare: bool, observer: Observer | None
    ) -> list[tuple[Use, RowLayout]]:
        """The uses of a parameter with their layouts."""
        known = self.layouts.get(p, {})
        called = any(self._capture.calls.get(owner) for owner in self._givers[p])
        derived = called and self._capture.double_backward
        try:
            above = graph.above(p, lambda use: self._layout(use, known, derived) is not None)
            unknown = [one for one in above.apart if one.kind not in self.of_no_row.get(p, ())]
            if bare and unknown:
                raise Unrecognised(unknown[0].name)
        except Unrecognised as error:
            if bare and not self._capture.unfamiliar.add(p, str(error)):
                self.drop(p, UNCHECKED.format(error))
            return []  # of a layer's parameter verification tells
        if observer is not None:
            for one in above.apart:
                observer.watch_apart(p, one)
        with_layouts = ((use, self._layout(use, known, derived)) for use in above.uses)
        return [(use, layout) for use, layout in with_layouts if layout is not None]

    def _layout(self, use: Use, known: Mapping[tuple[object, ...], RowLayout], derived: bool) -> RowLayout | None:
        """Where the rows are in a use's output; None if it is no use."""
        if self._capture.entries is not None:
            trusted = self.trusts_entries or use.kind in known
            return leading_entries(use, self._capture.entries) if trusted else None
        layout, rows = known.get(use.kind), self._capture.rows
        if layout is None and derived:
            layout = next((one for one in use.layouts(rows) if one.dim == 0 and one.place in ("alone", "first")), None)
        if layout is None or not use.is_readable:
            return None
        if not layout.fits(use.output, rows):
            raise Unrecognised(f"{use.last.name} of shape {tuple(use.output)} for {rows} rows")
        return layout

    def _watch(self, use: Use, layout: RowLayout) -> None:
        key = (
            id(self),
            self._batches,
            use.parameter,
            *((id(step.node), step.index) for step in (*use.steps, use.last)),
        )
        watched = use.last.node.metadata.setdefault(_WATCHED, set())  # there, so that nothing here holds a graph
        if key in watched:  # two passes through one graph
            return
        watched.add(key)
        call = self._capture.called(use.parameter)

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            if grads[0] is not None:
                self._backward(use, layout, call, grads[0])

        self._handles.append(use.last.node.register_prehook(hook))

    def _backward(self, use: Use, layout: RowLayout, call: Call, output_grads: Tensor) -> None:
        capture, parameter = self._capture, use.parameter
        if not capture.active or parameter in self._left_out:
            return
        try:
            if not capture.received(parameter, call, capture.every_pass or adds_to_grad(parameter)):
                return
            with plain_arithmetic(output_grads.device):
                owner, name = self._owners[parameter]
                output_grads = capture.unscaled(output_grads)
                if capture.entries is None:
                    found = use.grad_sample(output_grads, layout, capture.rows)
                else:
                    found = of_use(use, output_grads, layout, capture.entries)
                capture.receive(owner, {name: found})
        except Unrecognised as error:
            self.drop(parameter, f"it is used in a way from which no rows' gradients can be read: {error}")
        except Exception as error:  # never raised into the training's backward pass
            capture.give_up(parameter, error)


def leading_entries(use: Use, entries: EntryIndex) -> RowLayout | None:
    """Where a use's output holds all entries of one kind, or the rows: they lead; None if it does neither."""
    try:
        index, dims = entries.of(use.output)
    except RowMismatch:
        return None
    count = entries.rows if index is None else index.numel()
    if dims > 1:
        return next(iter(use.pairs(count)), None)
    return RowLayout(0, "alone") if RowLayout(0, "alone") in use.layouts(count) else None


def of_use(use: Use, output_grads: Tensor, layout: RowLayout, entries: EntryIndex) -> GradSample:
    """The rows' gradients of a use whose output holds entries, or rows."""
    index, _ = entries.of(use.output)
    if index is None:
        return use.grad_sample(output_grads, layout, entries.rows)
    return of_entries(use.grad_sample(output_grads, layout, index.numel()), index, entries.rows)
