"""Before the first step: are the functions of layers with code of their own right, row by row?

A subclass of a known layer may compute something else (ConvNeXt's LayerNorm permutes, a convolution standardises its
weights), a user's function may have a mistake, and a class of another library may only be called alike. Sums over rows
can agree by chance where rows do not. So each of these layers runs once more on its own inputs, and for two rows the
function's gradients are compared with those of autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ine_callback.capture.attributes import plain_parameters
from ine_callback.capture.hooks import Capture, first_input, in_words
from ine_callback.capture.layers import ALTERNATIVES, LayerFunction, by_row, grad_samples_of, layer_function
from ine_callback.distributed.sharding import is_sharded
from ine_callback.utilities.isolation import isolated

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


def wrong_functions(
    module: nn.Module, capture: Capture, run: Callable[[nn.Module, Any], object], batch: Any, rows: int
) -> dict[nn.Module, str]:
    """Modules whose layer function is wrong for them -> why. Runs the model isolated, if there is a layer to look at.

    Where an alternative (:data:`.ALTERNATIVES`) is right, the capture is told to use that.

    Args:
        module: The model.
        capture: Its hooks.
        run: Computes the loss of a batch.
        batch: The first training batch.
        rows: Its number of rows.
    """
    odd = [child for child in capture.names if _is_odd(child)]
    if not odd or is_sharded(module):
        return {}
    modes = {part: part.training for child in odd for part in child.modules()}
    found: dict[nn.Module, str] = {}
    inside: set[nn.Module] = set()

    def look(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if child in inside or not (isinstance(first_input(args, kwargs), Tensor) and isinstance(output, Tensor)):
            return  # the hooks drop what has no single input and output
        inside.add(child)  # its first call is looked at, and no call that the look makes
        for part in child.modules():
            part.training = modes[part]
        try:
            found[child] = _settle(capture, child, args, kwargs, rows)
        finally:
            for part in child.modules():
                part.training = False

    handles = [child.register_forward_hook(look, with_kwargs=True) for child in odd]
    try:
        with isolated(module), capture.paused(), torch.no_grad():
            run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {child: why for child, why in found.items() if why}


def _is_odd(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn.modules.") or "forward" in module.__dict__


def _settle(capture: Capture, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> str:
    """Chooses the function that fits; why there is none, else an empty string."""
    known = layer_function(child)
    assert known is not None
    first = ""
    for function in (known, *([ALTERNATIVES[known]] if known in ALTERNATIVES else [])):
        try:
            error, allowed = _error(child, function, args, kwargs, rows)
        except Exception as failure:
            first = first or in_words(failure)
            continue
        if error <= allowed:
            capture.functions[child] = function
            return ""
        first = first or (
            f"the function for {type(child).__name__} gives rows other gradients than autograd (relative error "
            f"{error:.1g}): its forward pass is another; register one that fits with @register_layer"
        )
    return first


def _error(
    child: nn.Module, function: LayerFunction, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
) -> tuple[float, float]:
    """The largest error of two rows' gradients, relative to the largest gradient, and what is allowed."""
    args, kwargs = tree_map(_fresh, args), tree_map(_fresh, kwargs)
    a = first_input(args, kwargs)
    kept = a.clone()  # the layer may write into its input
    parameters = {name: p for name, p in plain_parameters(child).items() if p.requires_grad and p.numel()}
    with torch.enable_grad():
        output = child.forward(*args, **kwargs)
    delta = torch.randn_like(output)
    with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
        grad_samples = grad_samples_of(child, kept, delta.clone(), rows, function)
    names = [name for name in parameters if name in grad_samples]
    worst, size = 0.0, 0.0
    for k in {0, rows - 1}:
        alone = torch.zeros_like(delta)
        by_row(alone, rows)[k] = by_row(delta, rows)[k]
        truth = torch.autograd.grad(output, [parameters[n] for n in names], alone, retain_graph=True, allow_unused=True)
        for name, expected in zip(names, truth, strict=True):
            got = grad_samples[name].wide().gradient(slice(k, k + 1))
            expected = torch.zeros_like(got) if expected is None else _dense(expected).to(got.dtype).view_as(got)
            worst = max(worst, float((got - expected).norm()))
            size = max(size, float(expected.norm()))
    precise = min((output.dtype, *(p.dtype for p in parameters.values())), key=lambda kind: -torch.finfo(kind).eps)
    return (worst / size if size else worst), _TOLERANCE.get(precise, 1e-1)


def _fresh(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
