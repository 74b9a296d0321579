"""Hooks that read each layer's activations and output gradients from the live passes, and change nothing in them.

A forward hook saves the input; a *tensor* hook on the output, or on each of several, receives the gradient (a full
backward hook would wrap the module and break in-place activations). Neither draws random numbers, synchronises with the
device or returns anything. Inside of torch.compile the hook is traced instead: :mod:`ine_callback.capture.compiled`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from ine_callback.capture.attributes import own_parameters
from ine_callback.capture.bare import BareParameters
from ine_callback.capture.bare.parameters import Observer
from ine_callback.capture.batch_layout import UNKNOWN_ENTRIES, BatchLayout
from ine_callback.capture.compiled import Hook, HookGuards, Tap, forget_compiled
from ine_callback.capture.entries import EntryIndex
from ine_callback.capture.errors import FATAL, in_words
from ine_callback.capture.layers import LayerFunction, RowMismatch, is_capturable
from ine_callback.capture.layers.calls import LayerCall, Tensors, first_of, has_one_input, layer_call, mapped
from ine_callback.capture.layers.normalization import ROW_MIXING_TYPES, summed_norm
from ine_callback.capture.marks import MarkedCall, mark_call
from ine_callback.capture.passes import Call, in_transform, parameters_passed_by, plain_arithmetic
from ine_callback.capture.per_sample_gradients import GradSample, widened
from ine_callback.capture.routed import base_of, rows_of_selected
from ine_callback.capture.saved_inputs import save
from ine_callback.capture.unfamiliar import RENAMED, Unfamiliar, other_weights, renamed
from ine_callback.data.nested import values_of
from ine_callback.errors import RowsError
from ine_callback.utilities.isolation import compiled_parts, split_again

_LATE = "its layer was not in the model when the recording began; put it there before the fit"
_UNTRACED = "the rows of its input of shape {}, entries that an index selected, cannot be traced in the graph"

Receiver = Callable[[nn.Module, dict[str, GradSample]], None]


class Capture:
    """Hooks on every module with a layer function and parameters of its own; frozen ones too, as they may thaw.

    Args:
        module: The model.
        receive: Called in the backward pass with a module and the per-sample gradients of one of its calls.
        fail: Called with an exception that concerns more than one layer; it is not raised into the backward pass.
        layers: Patterns (``fnmatch``) of the modules' names; None: all.
        on_drop: Called with a module, or bare parameter, that is dropped; what it contributed to this batch may be
            incomplete.
        every_pass: Whether to read passes that add nothing to ``grad`` too (our own, by ``torch.autograd.grad``).

    Attributes:
        active: Hooks do nothing while this is False.
        rows: Number of rows of the current batch.
        deselected: Names of modules that no pattern fits.
        bare: Hooks on the operations that use parameters outside of a layer's call.
        calls: Counted calls of each layer in this batch, and uses of each bare parameter.
        dropped: Name of a module or bare parameter -> why it has no per-sample gradients.
        approximate: Module name -> why single rows are approximate.
        unscale: Factor that undoes the scaling of the loss under mixed precision.
        half: Whether a gradient came in half precision.
        functions: Layer functions that the check before the first step chose, in place of those of the types.
        double_backward: Whether a gradient of this batch was made differentiable itself (``create_graph=True``).
        entries: The row of each entry, in batches in which rows do not lead.
        rows_of: What gives a batch's rows and entries, if known.
        routed: Layers that get entries selected by an index, whose rows are traced in the graph (experts).
        selected: The rows of the entries of the present call of one of them.
        marked: The present call as the graph tells it, if it is part of one.
        last_called: The recorded layer that was called last in this batch.
        on_call: If set, called with (name, first input) of each hooked module instead of recording.
        views: Views of its rows that layers get, one after another (SimCLR's ``torch.cat``); added up by row.
        loss_views: Views of its rows that only the loss gets together (``views`` of the layers are of the loss, too).
        unfamiliar: What the present batch does otherwise than those before.
        borrowed: Whether what is received may be in memory that compiled code uses again as soon as it goes on.
        one_each: Whether a layer must get one entry of each row: several may be those of true and made rows, joined.
    """

    def __init__(
        self,
        module: nn.Module,
        receive: Receiver,
        fail: Callable[[Exception], None],
        layers: Sequence[str] | None = None,
        on_drop: Callable[[nn.Module | nn.Parameter], None] = lambda lost: None,
        every_pass: bool = False,
    ) -> None:
        split_again(module)  # its parameters here must be those that the optimizer has
        self.receive, self._fail, self._on_drop, self.every_pass = receive, fail, on_drop, every_pass
        self.active, self.rows, self.views, self.one_each = False, 0, 1, False
        self.loss_views = 1
        inside = {child for part in compiled_parts(module) for child in part.modules()}
        found = {child: name for name, child in module.named_modules() if is_capturable(child)}
        fits = [name for name in found.values() if layers is None or any(fnmatchcase(name, one) for one in layers)]
        self.deselected = set(found.values()) - set(fits)
        self.names = {child: name for child, name in found.items() if name not in self.deselected}
        self.dropped: dict[str, str] = {}
        self.approximate = {
            name: f"{type(child).__name__} mixes the rows of a batch: their sum is exact, single rows are approximate"
            for child, name in self.names.items()
            if isinstance(child, ROW_MIXING_TYPES)
        }
        self.unfamiliar = Unfamiliar()
        self.bare = BareParameters(self, module, layers, without=inside)
        self.calls: dict[nn.Module | nn.Parameter, int] = {}
        self.unscale: Tensor | None = None
        self.half = self.double_backward = self.borrowed = False
        self._received: list[tuple[nn.Module | nn.Parameter, Call]] = []
        self._parts: dict[nn.Module, int] = {}  # calls that one call is received as
        self._worked: set[nn.Module] = set()  # modules whose layer function has succeeded
        self._rows_confirmed = False  # some layer's input in this batch has as many rows as were announced
        self._parameters: dict[nn.Module, dict[str, nn.Parameter]] = {}  # when the recording began
        self.functions: dict[nn.Module, LayerFunction] = {}
        self.on_call: Callable[[str, Tensor], None] | None = None
        self._handles: list[RemovableHandle] = []
        self._guards = HookGuards()
        self._awaited: list[RemovableHandle] = []  # on several outputs of one call in this batch
        self.entries: EntryIndex | None = None
        self.routed: set[nn.Module] = set()
        self.selected: Tensor | None = None
        self.marked: MarkedCall | None = None
        self.rows_of: Callable[[Any], Any] | None = None
        self._seen = False  # whether this batch's loss is known: passes before are the training step's own
        self.last_called: nn.Module | None = None

    def attach(self, fresh: bool = True) -> None:
        """Sets the hooks; what was compiled before, unless it is ``fresh``, is compiled anew, for it lacks them."""
        if not fresh:
            forget_compiled()
        self._guards.attach()
        for child in self.names:
            self._parameters[child] = own_parameters(child)
            taps = has_one_input(child)
            hook = Tap(child, self._forward, self._receive, self.drop) if taps else Hook(self._forward)
            self._handles.append(child.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        self._guards.detach()
        self.end_batch()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start_batch(self, rows: int, entries: EntryIndex | None = None) -> None:
        self.entries = entries
        self.rows, self.active, self._rows_confirmed, self.double_backward = rows, True, False, False
        self._seen, self.last_called = False, None
        self.calls.clear()
        self._received.clear()
        self._release()

    def end_batch(self) -> None:
        self.active = False
        self._release()

    def _release(self) -> None:
        """Removes the hooks on the batch's graph."""
        self.bare.release()
        for handle in self._awaited:
            handle.remove()
        self._awaited.clear()

    def see(self, loss: Tensor, observer: Observer | None = None) -> set[nn.Parameter]:
        """Takes the loss that is about to be differentiated, in whose graph parameters are found outside of layers.

        Returns:
            Parameters of recorded layers that are also used elsewhere.
        """
        self._seen = True
        return self.bare.see(loss, observer) if self.active else set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignores passes through the model that are not the training's own."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def drop(self, module: nn.Module, reason: str) -> None:
        """Ignores a module from now on; its parameters may be read elsewhere, at their uses."""
        if module not in self.names:
            return
        if self.bare.takes(module):
            self.dropped[self.names.pop(module)] = reason
        else:
            self.lost(module, self.names.pop(module), reason)

    def follow(self, module: nn.Module) -> None:
        """Records a layer no more whose parameters were renamed; these are read at their uses, if they can be."""
        self.names.pop(module, None)

    def lost(self, what: nn.Module | nn.Parameter, name: str, reason: str) -> None:
        """A module or bare parameter has no per-sample gradients from now on."""
        self.dropped[name] = reason
        self._on_drop(what)

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.selected = self.marked = None
        try:
            read, saved = layer_call(module, args, kwargs, output), None
        except Exception as error:
            read, saved = LayerCall(fault=in_words(error)), None
        if read.requires_grad and not in_transform():
            # before anything else, even if the recording has stopped: the recomputation of a checkpoint must save what
            # the first pass saved, and ends here with an exception of its own when it has all
            saved = save(read.inputs)
        try:
            if saved is not None:
                self._mark(module, read, args[0] if len(args) == 1 and not kwargs else (args, kwargs))
            self._on_forward(module, read, saved)
        except Exception as error:
            self.give_up(module, error)
        self.marked = None  # it holds a part of the graph

    def _mark(self, module: nn.Module, read: LayerCall, inputs: Any) -> None:
        """Marks a call in the graph; of a layer of selected entries, if their rows can be traced."""
        if module not in self.names or read.fault:
            return
        x = read.activations
        if module in self.routed and isinstance(x, Tensor):
            self.selected = rows_of_selected(x, base_of(self.rows, self.entries, x.device))
        if module not in self.routed or self.selected is not None:
            self.marked = mark_call(module, inputs, read.outputs, self.selected)

    def _on_forward(self, module: nn.Module, read: LayerCall, saved: Callable[[], Tensors | None] | None) -> None:
        """Waits for the gradients of the outputs, or drops a module that is called in an unknown way."""
        if module not in self.names:
            return
        x = read.activations
        if self.on_call is not None:
            if isinstance(x, Tensor):
                self.on_call(self.names[module], x if x.layout == torch.strided else x.to_dense())
            return
        if not (self.active and torch.is_grad_enabled()):
            return
        if renamed(own_parameters(module), self._parameters.get(module, {})):
            return self.unfamiliar.layers.add(module) if self.unfamiliar.follows else self.drop(module, RENAMED)
        if read.fault:
            self.drop(module, read.fault)
            return
        if in_transform():
            self.drop(module, "it was called inside of a torch.func transform")
            return
        self._rows_confirmed |= x.shape[:1] == (self.rows * self.views,)
        trainable = {p for p in module._parameters.values() if p is not None and p.requires_grad}
        if saved is None or not trainable:
            return
        if other := other_weights(own_parameters(module), self._parameters.get(module, {})):
            if any(p.requires_grad for p in other):
                self.drop(module, "it was called with other weights than its own (functional_call, or one replaced)")
            return
        if read.rows is not None and len(x) != self.rows:
            return self.drop(module, f"its nested input has {len(x)} rows, the batch {self.rows}")
        if module in self.routed and self.selected is None:
            return self.drop(module, _UNTRACED.format(tuple(x.shape)))
        if module in self.routed and not len(x):
            return  # an expert without a token
        call, self.last_called = self.called(module), module
        call.rows = self.selected if module in self.routed else read.rows
        if isinstance(read.outputs, Tensor):
            call.follow(read.outputs, trainable)
        self._await(read.outputs, lambda output_grads: self._backward(module, call, saved, output_grads))

    def _await(self, outputs: Tensors, receive: Callable[[Any], None]) -> None:
        """Calls ``receive`` when a backward pass has the outputs' gradients; of several outputs those it computes."""
        if isinstance(outputs, Tensor):
            outputs.register_hook(receive)
            return
        live = {name: output for name, output in outputs.items() if output.requires_grad}

        def on_grads(grads: Sequence[Tensor | None]) -> None:
            if found := {name: grad for name, grad in zip(live, grads, strict=True) if grad is not None}:
                receive(found)

        # the hooks refer to the graph that they are part of: removed when the batch ends, lest both stay
        self._awaited.append(register_multi_grad_hook(list(live.values()), on_grads))

    def uses(self, module: nn.Module, names: Iterable[str]) -> int:
        """How often a layer was called in this batch, or, if it was not, how often its named parameters were used."""
        calls = self.calls.get(module, 0) * self._parts.get(module, 1)
        used = max((self.calls.get(p, 0) for n, p in own_parameters(module).items() if n in names), default=0)
        return max(1, calls + used)

    def unhooked(self, module: nn.Module) -> dict[str, str]:
        """Names of layers that came into the model later -> why they are not recorded."""
        found = {n: m for n, m in module.named_modules() if is_capturable(m) and m not in self._parameters}
        return {n: _LATE for n in found if n not in self.dropped and n not in self.deselected}

    def waiting(self) -> set[nn.Parameter]:
        """Parameters of experts that got no entry in this batch; their gradients are zero."""
        return {
            p
            for one in self.routed & self.names.keys()
            if not self.calls.get(one)
            for p in own_parameters(one).values()
        }

    def forget(self) -> None:
        """The gradients of the batch's backward passes so far were removed: the calls in them do not count."""
        for what, call in self._received:
            self._count(what, call, False)
        self._received.clear()

    def called(self, what: nn.Module | nn.Parameter) -> Call:
        """Counts a call of a layer, or a use of a bare parameter."""
        self.calls[what] = self.calls.get(what, 0) + 1
        return Call()

    def _count(self, what: nn.Module | nn.Parameter, call: Call, counts: bool) -> None:
        if call.counts != counts:
            self.calls[what] += 1 if counts else -1
            call.counts = counts

    def received(self, what: nn.Module | nn.Parameter, call: Call, counts: bool) -> bool:
        """Counts what a backward pass has come to, if it adds to the gradients (``counts``, returned)."""
        self.double_backward |= torch.is_grad_enabled()
        self._count(what, call, counts)
        if counts:
            self._received.append((what, call))
        return counts

    def unscaled(self, output_grads: Tensor) -> Tensor:
        """An output gradient, detached and without the scaling of the loss."""
        self.half |= output_grads.dtype in (torch.float16, torch.bfloat16)
        output_grads = values_of(output_grads).detach()
        if self.unscale is None:
            return output_grads
        output_grads = widened(output_grads) * self.unscale
        # an overflow: the scaler skips the step, so nothing of it may reach the curvature
        return torch.where(output_grads.isfinite().all(), output_grads, 0.0)

    def _receive(self, module: nn.Module, activations: Tensors, output_grads: Tensors) -> None:
        """Takes what a compiled backward pass computed; how often a compiled layer was called is known there only."""
        self.borrowed = True
        if not self.active or module not in self.names:
            return
        leading, summed = first_of(output_grads).shape[:1], not isinstance(activations, Tensor)
        self._rows_confirmed |= leading == (self.rows * self.views,)
        if self.one_each and leading != (self.rows,):
            return self.drop(module, UNKNOWN_ENTRIES.format(*leading, self.rows))
        if module in self.routed or (summed and self.entries is not None):
            return self.drop(module, "torch.compile runs it, where no rows but those that lead can be told apart")
        function = summed_norm if summed else None
        self._backward(module, self.called(module), lambda: activations, output_grads, function)

    def _backward(
        self,
        module: nn.Module,
        call: Call,
        saved: Callable[[], Tensors | None],
        output_grads: Tensors,
        function: LayerFunction | None = None,
    ) -> None:
        if not self.active or module not in self.names:
            return
        try:
            # of torch.autograd.grad, or backward(inputs=...)
            if self.every_pass and not self._seen:
                return
            passed_by = set() if self.every_pass else parameters_passed_by(module, call)
            named = module._parameters.items()
            passed = passed_by and all(p is None or n in passed_by or not p.requires_grad for n, p in named)
            if not self.received(module, call, not passed):
                return
            activations = saved()
            if activations is None:
                self.drop(module, "its input was changed in place after the layer had read it")
                return
            with plain_arithmetic(first_of(output_grads).device):
                output_grads = mapped(self.unscaled, output_grads)
                layout = BatchLayout(self.rows, self.views, self.one_each, self.entries)
                function = function or self.functions.get(module)
                parts = layout.by_row(module, call.rows, activations, output_grads, function)
                self._parts[module] = len(parts)
                for part in parts:
                    self.receive(module, {name: g for name, g in part.items() if name not in passed_by})
                self._worked.add(module)
        except RowMismatch as error:
            if module in self._worked and not self._rows_confirmed:
                self._fail(RowsError(f"{self.names[module]}: {error}; check row_fn and the collate function"))
            else:
                self.drop(module, str(error))
        except Exception as error:  # never raised into the training's backward pass
            self.give_up(module, error)

    def give_up(self, what: nn.Module | nn.Parameter, error: Exception) -> None:
        """After an exception: drops the layer or parameter, or stops the recording if the error is the machine's."""
        if isinstance(error, FATAL):
            self._fail(error)
        elif isinstance(what, nn.Parameter):
            self.bare.drop(what, in_words(error))
        else:
            self.drop(what, in_words(error))
