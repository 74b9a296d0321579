"""Hooks that read each layer's input and output gradient off the live pass; they change nothing in it.

A forward hook holds the input, a *tensor* hook on the output receives the gradient (a full backward hook would wrap the
module and break in-place activations). Neither draws random numbers, synchronises or returns anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ine_callback.capture.layers import ROW_MIXING, RowMismatch, layer_function, records_of
from ine_callback.capture.per_sample_gradients import Record, widened
from ine_callback.errors import RowsError
from ine_callback.utilities.isolation import compiled_parts

_COMPILED = "it runs inside torch.compile, which calls no hooks"

Receiver = Callable[[nn.Module, dict[str, Record]], None]


class Capture:
    """Hooks on every module with a known layer function and parameters of its own, also frozen ones: they may thaw.

    Args:
        module: The model.
        receive: Called in the backward pass with a module and the records of one of its calls.
        fail: Called with an exception raised inside a hook, so that the backward pass itself goes on.
        layers: Patterns (``fnmatch``) of the modules' names; None: all.

    Attributes:
        active: Hooks do nothing while this is False.
        rows: Number of rows of the current batch.
        deselected: Names of modules that no pattern fits.
        dropped: Module name -> why its gradients cannot be told apart by rows.
        approximate: Module name -> why single rows are approximate.
        unscale: Factor that undoes the scaling of the loss under mixed precision.
        half: Whether a gradient came in half precision.
        observe_call: Set by the probe: called with (name, first input) of each hooked module instead of recording.
    """

    def __init__(
        self,
        module: nn.Module,
        receive: Receiver,
        fail: Callable[[Exception], None],
        layers: Sequence[str] | None = None,
    ) -> None:
        self._receive, self._fail = receive, fail
        self.active, self.rows = False, 0
        inside = {child for part in compiled_parts(module) for child in part.modules()}
        found = {child: name for name, child in module.named_modules() if _capturable(child)}
        fits = [name for name in found.values() if layers is None or any(fnmatchcase(name, one) for one in layers)]
        self.deselected = set(found.values()) - set(fits)
        known = {child: name for child, name in found.items() if name not in self.deselected}
        self.names = {child: name for child, name in known.items() if child not in inside}
        self.dropped = {name: _COMPILED for child, name in known.items() if child in inside}
        self.approximate = {
            name: f"{type(child).__name__} mixes the rows of a batch: shares add up exactly, single rows do not"
            for child, name in self.names.items()
            if isinstance(child, ROW_MIXING)
        }
        self.calls: dict[nn.Module, int] = {}
        self.unscale: Tensor | None = None
        self.half = False
        self._proved: set[nn.Module] = set()
        self.observe_call: Callable[[str, Tensor], None] | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        for child in self.names:
            self._handles.append(child.register_forward_hook(self._forward, with_kwargs=True))

    def detach(self) -> None:
        self.active = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start_batch(self, rows: int) -> None:
        self.rows, self.active = rows, True
        self.calls.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For passes through the model that are not the training's own."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def drop(self, module: nn.Module, reason: str) -> None:
        self.dropped[self.names.pop(module)] = reason

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        a = args[0] if args else next(iter(kwargs.values()), None)
        held = None
        if isinstance(a, Tensor) and isinstance(output, Tensor) and output.requires_grad:
            # first, and whatever became of the recording: a recomputation must save what the pass before it saved
            held = _hold(a)
        if module not in self.names:
            return
        if self.observe_call is not None:
            if isinstance(a, Tensor):
                self.observe_call(self.names[module], a)
            return
        if not (self.active and torch.is_grad_enabled()):
            return
        if not (isinstance(a, Tensor) and isinstance(output, Tensor)):
            self.drop(module, "its input or output is not a single tensor")
            return
        if held is None or not any(p.requires_grad for p in module.parameters(recurse=False)):
            return
        self.calls[module] = self.calls.get(module, 0) + 1
        output.register_hook(lambda delta: self._backward(module, held, delta))

    def _backward(self, module: nn.Module, held: Callable[[], Tensor | None], delta: Tensor) -> None:
        if not self.active or module not in self.names:
            return
        try:
            a = held()
            if a is None:
                self.drop(module, "its input was changed in place after the layer had read it")
                return
            with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
                self.half |= delta.dtype in (torch.float16, torch.bfloat16)
                delta = delta.detach()
                if self.unscale is not None:
                    delta = widened(delta) * self.unscale
                    # an overflow: the scaler skips the step, and nothing of it may stay in the curvature
                    delta = torch.where(delta.isfinite().all(), delta, 0.0)
                records = records_of(module, a, delta, self.rows)
                self._receive(module, records)
                self._proved.add(module)
        except RowMismatch as error:
            if module in self._proved:
                self._fail(RowsError(f"{self.names[module]}: {error}; check row_fn and the collate function"))
            else:
                self.drop(module, str(error))
        except Exception as error:  # the training run is sacred: report, never raise into its backward pass
            self._fail(error)


class _Keep(torch.autograd.Function):
    """Saves an input as autograd saves one, so that what is done to saved tensors is done to it too."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return handle.clone()


def _hold(a: Tensor) -> Callable[[], Tensor | None]:
    """Returns what gives the input back in the backward pass; None, where it was changed in place since.

    Inside of activation checkpointing, or where activations are moved off the device, holding the input itself would
    undo what they save.
    """
    a, version = a.detach(), a._version
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return lambda: a if a._version == version else None
    kept = _Keep.apply(torch.empty(0, requires_grad=True), a)  # type: ignore[no-untyped-call]
    return lambda: kept.grad_fn.saved_tensors[0]


def _capturable(module: nn.Module) -> bool:
    return layer_function(module) is not None and any(True for _ in module.parameters(recurse=False))
