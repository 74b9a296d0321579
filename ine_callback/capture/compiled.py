"""Layers inside of torch.compile: an operation in the compiled graph hands their tensors to the recording.

There a hook is traced into the graph, once, and never called. So what it does must be tensors alone. The layer's output
goes through an identity, whose backward pass has an operation that the compiler does not look into: it gets the layer's
input and its output gradient whenever the compiled backward pass runs, also under ``fullgraph=True``. The operation
returns a zero, the gradient of a leaf of our own, for what returns nothing is taken out of a graph.

Those tensors are the graph's: it may write other values into their memory once the operation is over.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, ClassVar, SupportsIndex
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from ine_callback.capture.attributes import own_parameters, setting
from ine_callback.capture.layers.calls import Tensors, first_input
from ine_callback.capture.layers.normalization import norm_sums
from ine_callback.capture.per_sample_gradients import widened

Received = Callable[[nn.Module, Tensors, Tensors], None]

_taps: WeakValueDictionary[int, Tap] = WeakValueDictionary()  # by the address of their leaf

LIBRARY = torch.library.Library("ine_callback", "DEF")
# lest a CUDA graph replays the kernels that the recording once launched there, and nothing else of it
_tags = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
LIBRARY.define("receive(Tensor[] tensors, Tensor leaf) -> Tensor", tags=_tags)


@torch.library.impl(LIBRARY, "receive", "CompositeExplicitAutograd")
def _receive(tensors: list[Tensor], leaf: Tensor) -> Tensor:
    tap = _taps.get(leaf.data_ptr())
    if tap is not None and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        tap.lose("it became part of a CUDA graph, which is replayed without the recording (mode='reduce-overhead')")
    elif tap is not None:
        tap.take(tensors)
    return torch.zeros_like(leaf)


torch.library.register_fake("ine_callback::receive", lambda tensors, leaf: torch.zeros_like(leaf), lib=LIBRARY)


class _Identity(torch.autograd.Function):
    """Its output in the forward pass; in the backward pass it hands over the layer's input and output gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, activations: Tensor, leaf: Tensor) -> Tensor:
        ctx.save_for_backward(activations, leaf)
        return output.clone()  # no view, lest an in-place activation follows; the compiler takes the copy out

    @staticmethod
    def backward(ctx: Any, output_grads: Tensor) -> tuple[Tensor | None, ...]:
        activations, leaf = ctx.saved_tensors
        return output_grads, None, torch.ops.ine_callback.receive([activations, output_grads], leaf)


class _NormIdentity(torch.autograd.Function):
    """The same for a norm, whose scale's and shift's gradients the compiler fuses with the norm's own."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, activations: Tensor, leaf: Tensor, trailing: int, eps: float, mean: bool
    ) -> Tensor:
        ctx.save_for_backward(activations, leaf)
        ctx.trailing, ctx.eps, ctx.mean = trailing, eps, mean
        return output.clone()

    @staticmethod
    def backward(ctx: Any, output_grads: Tensor) -> tuple[Tensor | None, ...]:
        activations, leaf = ctx.saved_tensors
        sums = norm_sums(widened(activations), widened(output_grads), ctx.trailing, ctx.eps, ctx.mean)
        return output_grads, None, torch.ops.ine_callback.receive(list(sums), leaf), None, None, None


class Hook:
    """A forward hook that a module's copies and pickles do not take along: theirs does nothing, and is Python's own.

    Args:
        eager: What it calls, with the module, its arguments and its output.
    """

    def __init__(self, eager: Callable[..., None]) -> None:
        self._eager = eager

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self._eager(module, args, kwargs, output)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything and returns nothing


class Tap(Hook):
    """One layer's way out of compiled graphs; a forward hook that is traced there.

    Args:
        module: The layer, with one input and one output.
        eager: The hook elsewhere.
        receive: Called in a compiled backward pass with the module, its input and its output gradient; of a norm with
            nothing and the gradients of scale and shift [n, D], for each of the n entries that lead its input.
        drop: Called with the module and a reason when it cannot be recorded.
    """

    def __init__(
        self,
        module: nn.Module,
        eager: Callable[..., None],
        receive: Received,
        drop: Callable[[nn.Module, str], None],
    ) -> None:
        super().__init__(eager)
        self._module, self._receive, self._drop = module, receive, drop
        self._leaf = torch.zeros(1, device=next(iter(own_parameters(module).values())).device, requires_grad=True)
        self._norm: tuple[int, float, bool] | None = None
        if type(module) in (nn.LayerNorm, nn.RMSNorm):  # subclasses may compute something else
            self._norm = len(setting(module, "normalized_shape")), setting(module, "eps"), type(module) is nn.LayerNorm
        _taps[self._leaf.data_ptr()] = self

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self._eager(module, args, kwargs, output)
        x = first_input(args, kwargs)
        if not (torch.is_grad_enabled() and isinstance(x, Tensor) and isinstance(output, Tensor)):
            return None
        if not output.requires_grad or not any(p is not None and p.requires_grad for p in module._parameters.values()):
            return None
        if self._norm is None:
            return _Identity.apply(output, x, self._leaf)  # type: ignore[no-untyped-call]
        return _NormIdentity.apply(  # type: ignore[no-untyped-call]
            output, x, self._leaf, *self._norm
        )

    def lose(self, reason: str) -> None:
        """The layer cannot be recorded."""
        self._drop(self._module, reason)

    def take(self, tensors: list[Tensor]) -> None:
        """Takes what the operation got."""
        if self._norm is None:
            self._receive(self._module, *tensors)
        else:
            self._receive(self._module, {}, dict(zip(("weight", "bias"), tensors, strict=True)))


def forget_compiled() -> None:
    """Has compiled code compiled anew at its next call, for what was compiled before hooks came lacks them.

    Only if something was compiled yet. What the compiler knows of changing shapes it keeps: it decides which code it
    makes, and so the last bits of what that computes.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    frames = dynamo.convert_frame
    for code in (known() for known in [*frames.input_codes.seen, *frames.output_codes.seen]):
        if code is not None:
            torch._C._dynamo.eval_frame.reset_code(code)


class HookGuards:
    """While taps are attached the compiler asks whether a module has hooks: its twin's graph may have none."""

    _attached: ClassVar[WeakSet[HookGuards]] = WeakSet()
    _before: ClassVar[bool] = True  # what the user had set

    def attach(self) -> None:
        """Begins; nothing to do where nothing can have been compiled."""
        if dynamo := sys.modules.get("torch._dynamo"):
            if not HookGuards._attached:
                HookGuards._before = dynamo.config.skip_nnmodule_hook_guards
            HookGuards._attached.add(self)
            dynamo.config.skip_nnmodule_hook_guards = False

    def detach(self) -> None:
        """Ends; the last one restores what the user had set."""
        if self in HookGuards._attached:
            HookGuards._attached.remove(self)
            if not HookGuards._attached:
                sys.modules["torch._dynamo"].config.skip_nnmodule_hook_guards = HookGuards._before
