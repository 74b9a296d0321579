"""The check of layer functions, before the first step: do subclasses and registered layers get the right gradients?

A subclass of a known layer may compute something else (ConvNeXt's LayerNorm permutes, a convolution standardises its
weights), a user's function may be wrong, and a class of another library may only have the same name. Sums over rows can
agree by chance even if single rows are wrong. So each such layer is run once more on its inputs, and for two rows the
function's gradients are compared with those of autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ine_callback.capture.attributes import plain_parameters
from ine_callback.capture.errors import in_words
from ine_callback.capture.hooks import Capture
from ine_callback.capture.layers import LayerFunction, by_row, entries_of, grad_samples_of, layer_function
from ine_callback.capture.layers.calls import first_input
from ine_callback.capture.layers.normalization import ALTERNATIVES
from ine_callback.distributed.sharding import is_sharded
from ine_callback.utilities.isolation import isolated

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


def layer_function_faults(
    module: nn.Module, capture: Capture, run: Callable[[nn.Module, Any], object], batch: Any, rows: int
) -> dict[nn.Module, str]:
    """Modules whose layer function is wrong for them -> why. Runs the model isolated, if there is a layer to check.

    If an alternative (:data:`.ALTERNATIVES`) is right, the capture uses that.

    Args:
        module: The model.
        capture: Its hooks.
        run: Computes the loss of a batch.
        batch: The first training batch.
        rows: Its number of rows.
    """
    custom = [child for child in capture.names if _has_own_code(child)]
    if not custom or is_sharded(module):
        return {}
    modes = {part: part.training for child in custom for part in child.modules()}
    faults: dict[nn.Module, str] = {}
    checked: set[nn.Module] = set()

    def check(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if child in checked or not (isinstance(first_input(args, kwargs), Tensor) and isinstance(output, Tensor)):
            return  # layers without a single input and output are dropped by the hooks
        checked.add(child)  # only the first call is checked, and none that the check itself makes
        for part in child.modules():
            part.training = modes[part]
        try:
            faults[child] = _choose_function(capture, child, args, kwargs, rows)
        finally:
            for part in child.modules():
                part.training = False

    handles = [child.register_forward_hook(check, with_kwargs=True) for child in custom]
    try:
        with isolated(module), capture.paused(), torch.no_grad():
            run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {child: why for child, why in faults.items() if why}


def _has_own_code(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn.modules.") or "forward" in module.__dict__


def _choose_function(
    capture: Capture, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
) -> str:
    """Chooses the function that is right; returns why there is none, else an empty string."""
    known = layer_function(child)
    assert known is not None
    first = ""
    for function in (known, *([ALTERNATIVES[known]] if known in ALTERNATIVES else [])):
        try:
            error, allowed = _error(capture, child, function, args, kwargs, rows)
        except Exception as failure:
            first = first or in_words(failure)
            continue
        if error <= allowed:
            capture.functions[child] = function
            return ""
        first = first or (
            f"the function for {type(child).__name__} gives rows other gradients than autograd (relative error "
            f"{error:.1g}): its forward pass differs; register a function for it with @register_layer"
        )
    return first


def _error(
    capture: Capture,
    child: nn.Module,
    function: LayerFunction,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: int,
) -> tuple[float, float]:
    """The largest error of two rows' gradients relative to the largest gradient, and the allowed error."""
    args, kwargs = tree_map(_fresh, args), tree_map(_fresh, kwargs)
    activations = first_input(args, kwargs).clone()  # the layer may write into its input
    dims = 1
    if child in capture.routed:
        rows = len(activations)
    elif capture.entries is None:
        rows *= entries_of(activations, rows)
    else:
        index, dims = capture.entries.of(activations.shape)
        rows = rows if index is None else index.numel()
        activations = activations.flatten(0, dims - 1)
    parameters = {name: p for name, p in plain_parameters(child).items() if p.requires_grad and p.numel()}
    with torch.enable_grad():
        output = child.forward(*args, **kwargs)
    output_grads = torch.randn_like(output)
    with torch.no_grad(), torch.autocast(output_grads.device.type, enabled=False):
        grad_samples = grad_samples_of(child, activations, output_grads.clone().flatten(0, dims - 1), rows, function)
    names = [name for name in parameters if name in grad_samples]
    worst, size = 0.0, 0.0
    for k in {0, rows - 1}:
        alone = torch.zeros_like(output_grads)
        by_row(alone.flatten(0, dims - 1), rows)[k] = by_row(output_grads.flatten(0, dims - 1), rows)[k]
        truth = torch.autograd.grad(output, [parameters[n] for n in names], alone, retain_graph=True, allow_unused=True)
        for name, expected in zip(names, truth, strict=True):
            found = grad_samples[name].wide().gradient(slice(k, k + 1))
            expected = torch.zeros_like(found) if expected is None else _dense(expected).to(found.dtype).view_as(found)
            worst = max(worst, float((found - expected).norm()))
            size = max(size, float(expected.norm()))
    precise = min((output.dtype, *(p.dtype for p in parameters.values())), key=lambda kind: -torch.finfo(kind).eps)
    return (worst / size if size else worst), _TOLERANCE.get(precise, 1e-1)


def _fresh(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
