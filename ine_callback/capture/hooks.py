"""Hooks that read each layer's input and output gradient off the live pass; they change nothing in it.

A forward hook holds the input, a *tensor* hook on the output receives the gradient (a full backward hook would wrap the
module and break in-place activations). Neither draws random numbers, synchronises or returns anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, ItemsView, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ine_callback.capture.attributes import LayerError, own_parameters
from ine_callback.capture.layers import ROW_MIXING, LayerFunction, RowMismatch, grad_samples_of, layer_function
from ine_callback.capture.passes import unused
from ine_callback.capture.per_sample_gradients import GradSample, widened
from ine_callback.errors import RowsError
from ine_callback.utilities.isolation import compiled_parts

_COMPILED = "it runs inside torch.compile, which calls no hooks"

# of the machine, not of a layer; torch 2.8 has the last
FATAL = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))

Receiver = Callable[[nn.Module, dict[str, GradSample]], None]


class _Call:
    """One call of a layer; ``counts``: whether its use adds to the gradients, as far as is known."""

    counts = True


class Capture:
    """Hooks on every module with a known layer function and parameters of its own, also frozen ones: they may thaw.

    Args:
        module: The model.
        receive: Called in the backward pass with a module and the records of one of its calls.
        fail: Called with an exception that is no single layer's, so that the backward pass itself goes on.
        layers: Patterns (``fnmatch``) of the modules' names; None: all.
        lose: Called with a module that is dropped: what came of it in this batch may be half of it.
        every_pass: Whether passes that add nothing to ``grad`` are read too (those of our own, by
            ``torch.autograd.grad``).

    Attributes:
        active: Hooks do nothing while this is False.
        rows: Number of rows of the current batch.
        deselected: Names of modules that no pattern fits.
        dropped: Module name -> why its gradients cannot be told apart by rows.
        approximate: Module name -> why single rows are approximate.
        unscale: Factor that undoes the scaling of the loss under mixed precision.
        half: Whether a gradient came in half precision.
        functions: Functions that the rows' check has found right instead of the one that a type says.
        twice: Whether a gradient was made differentiable itself (``create_graph=True``) in this batch.
        observe_call: Set by the probe: called with (name, first input) of each hooked module instead of recording.
    """

    def __init__(
        self,
        module: nn.Module,
        receive: Receiver,
        fail: Callable[[Exception], None],
        layers: Sequence[str] | None = None,
        lose: Callable[[nn.Module], None] = lambda module: None,
        every_pass: bool = False,
    ) -> None:
        self._receive, self._fail, self._lose, self._every_pass = receive, fail, lose, every_pass
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
        self.half = self.twice = False
        self._met: list[tuple[nn.Module, _Call]] = []
        self._proved: set[nn.Module] = set()
        self._led = False  # whether some layer's input in this batch is led by its rows: then their number is right
        self._own: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self.functions: dict[nn.Module, LayerFunction] = {}
        self.on_call: Callable[[str, Tensor], None] | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        for child in self.names:
            self._own[child] = own_parameters(child)
            self._handles.append(child.register_forward_hook(self._forward, with_kwargs=True))

    def detach(self) -> None:
        self.active = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start_batch(self, rows: int) -> None:
        self.rows, self.active, self._led, self.twice = rows, True, False, False
        self.calls.clear()
        self._met.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For passes through the model that are not the training's own."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def drop(self, module: nn.Module, reason: str) -> None:
        """Takes nothing more of a module, and forgets what came of it in this batch."""
        if module in self.names:
            self.dropped[self.names.pop(module)] = reason
            self._lose(module)

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        a, held = first_input(args, kwargs), None
        if isinstance(a, Tensor) and isinstance(output, Tensor) and output.requires_grad and not _transformed():
            # first, and whatever became of the recording: a recomputation must save what the pass before it saved,
            # and may end here, with an exception of its own
            held = _hold(a)
        try:
            self._see(module, a, held, output)
        except Exception as error:
            self._give_up(module, error)

    def _see(self, module: nn.Module, a: Any, held: Callable[[], Tensor | None] | None, output: Any) -> None:
        if module not in self.names:
            return
        if self.on_call is not None:
            if isinstance(a, Tensor):
                self.on_call(self.names[module], a if a.layout == torch.strided else a.to_dense())
            return
        if not (self.active and torch.is_grad_enabled()):
            return
        if not (isinstance(a, Tensor) and isinstance(output, Tensor)):
            self.drop(module, "its input or output is not a single tensor")
            return
        if _transformed():
            self.drop(module, "it was called inside of a torch.func transform")
            return
        self._led |= a.shape[:1] == (self.rows,)
        if held is None or not any(p.requires_grad for p in own_parameters(module).values()):
            return
        if other := self._other_weights(module):
            if any(p.requires_grad for p in other):
                self.drop(module, "it was called with other weights than its own (functional_call, or one replaced)")
            return
        self.calls[module] = self.calls.get(module, 0) + 1
        call = _Call()
        output.register_hook(lambda delta: self._backward(module, call, held, delta))

    def _other_weights(self, module: nn.Module) -> list[Tensor]:
        """What stands in the place of the parameters that the module had when the recording began."""
        now, own = own_parameters(module), self._own.get(module, {})
        return [
            now[name]
            for name, p in own.items()
            if name in now and now[name] is not p and not hasattr(p, "full_tensor")  # FSDP2 puts whole ones there
        ]

    def forget(self) -> None:
        """What the batch's backward passes read so far was thrown away: the calls in it do not count."""
        for module, call in self._met:
            self._count(module, call, False)
        self._met.clear()

    def _count(self, module: nn.Module, call: _Call, counts: bool) -> None:
        if call.counts != counts:
            self.calls[module] += 1 if counts else -1
            call.counts = counts

    def _backward(self, module: nn.Module, call: _Call, held: Callable[[], Tensor | None], delta: Tensor) -> None:
        if not self.active or module not in self.names:
            return
        try:
            self.twice |= torch.is_grad_enabled()
            # by torch.autograd.grad, or backward(inputs=...)
            passed_by = set() if self._every_pass else unused(module)
            if passed_by and all(p is None or n in passed_by or not p.requires_grad for n, p in _own(module)):
                self._count(module, call, False)
                return
            self._count(module, call, True)
            self._met.append((module, call))
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
                grad_samples = grad_samples_of(module, a, delta, self.rows, self.functions.get(module))
                self._receive(
                    module, {name: grad_sample for name, grad_sample in grad_samples.items() if name not in passed_by}
                )
                self._proved.add(module)
        except RowMismatch as error:
            if module in self._proved and not self._led:
                self._fail(RowsError(f"{self.names[module]}: {error}; check row_fn and the collate function"))
            else:
                self.drop(module, str(error))
        except Exception as error:  # the training run is sacred: report, never raise into its backward pass
            self._give_up(module, error)

    def _give_up(self, module: nn.Module, error: Exception) -> None:
        """After an exception: a layer's own ends its recording, any other everybody's."""
        if isinstance(error, FATAL):
            self._fail(error)
        else:
            self.drop(module, in_words(error))


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer function calls ``a``."""
    return args[0] if args else next(iter(kwargs.values()), None)


def in_words(error: Exception) -> str:
    """An exception as the reason why a layer is dropped."""
    if isinstance(error, LayerError):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), "")[:200]
    return f"recording it failed with {type(error).__name__}: {first}"


def _transformed() -> bool:
    """Whether torch.func (vmap, grad) runs the layer, on tensors that do not outlive it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _own(module: nn.Module) -> ItemsView[str, nn.Parameter | None]:
    return module._parameters.items()


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
    a, version = a.detach(), 0 if a.is_inference() else a._version
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return lambda: a if a.is_inference() or a._version == version else None
    kept = _Keep.apply(torch.empty(0, requires_grad=True), a)  # type: ignore[no-untyped-call]
    return lambda: kept.grad_fn.saved_tensors[0]


def _capturable(module: nn.Module) -> bool:
    return layer_function(module) is not None and bool(own_parameters(module))
