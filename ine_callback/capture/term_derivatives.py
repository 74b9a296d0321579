"""The derivative of every term's loss along a direction of the parameters: all tokens of a batch from one forward pass.

For a direction x and the losses l_ij of the terms j of row i,

    d_ij = <x, grad l_ij>,

which forward-mode differentiation gives for all terms at once, without any gradient of a single one. The module's own
loss is called, and its terms are read off the graph with their tangents. Operations without a forward mode leave the
central difference ``(l(w + h x) - l(w - h x)) / 2h``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ine_callback.capture.row_losses import LossReading, read_loss
from ine_callback.errors import InfluenceError


def term_derivatives(
    module: nn.Module, loss: Callable[[], Tensor], direction: Mapping[nn.Parameter, Tensor], rows: int
) -> tuple[LossReading, Tensor]:
    """What the loss consists of, and the derivatives [b, T] of its terms.

    Args:
        module: The model, in evaluation mode; its parameters are replaced meanwhile.
        loss: Computes the mean loss of a batch with the module.
        direction: x, for some of the parameters, each of the parameter's shape.
        rows: Number of rows b of the batch.

    Raises:
        InfluenceError: If the loss is of a form whose terms cannot be read.

    Example:
        >>> import torch
        >>> line, inputs = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
        >>> _ = torch.nn.init.zeros_(line.weight)
        >>> loss = lambda: torch.nn.functional.mse_loss(line(inputs), torch.ones(2, 1))
        >>> term_derivatives(line, loss, {line.weight: torch.ones(1, 1)}, 2)[1].flatten()
        tensor([-2., -4.])
    """
    try:
        return _forward_mode(module, loss, direction, rows)
    except (NotImplementedError, RuntimeError) as error:
        if not any(words in str(error) for words in ("forward AD", "jvp")):
            raise
    return _central_difference(module, loss, direction, rows)


def _forward_mode(
    module: nn.Module, loss: Callable[[], Tensor], direction: Mapping[nn.Parameter, Tensor], rows: int
) -> tuple[LossReading, Tensor]:
    def dual(parameter: nn.Parameter) -> Tensor:
        tangent = direction[parameter].to(parameter).view_as(parameter)
        made: Tensor = forward_mode.make_dual(parameter, tangent)
        return made

    with forward_mode.dual_level(), _replaced(module, direction, dual), sdpa_kernel(SDPBackend.MATH):
        reading = _read(loss(), rows)
        value, tangent = forward_mode.unpack_dual(reading.each)
        return reading, torch.zeros_like(value) if tangent is None else tangent.detach()


def _central_difference(
    module: nn.Module, loss: Callable[[], Tensor], direction: Mapping[nn.Parameter, Tensor], rows: int
) -> tuple[LossReading, Tensor]:
    length = torch.stack([x.norm() for x in direction.values()]).norm()
    size = torch.stack([p.detach().norm() for p in direction]).norm()
    precision = torch.finfo(next(iter(direction)).dtype).eps ** (1 / 3)  # where both errors of a difference are alike
    step = float(precision * size.clamp_min(1.0) / length.clamp_min(torch.finfo(length.dtype).tiny))
    each = []
    for sign in (1, -1):
        with _replaced(module, direction, lambda p, h=sign * step: p + h * direction[p].to(p).view_as(p)):  # type: ignore[misc]
            reading = _read(loss(), rows)
        each.append(reading.each)
    return reading, (each[0] - each[1]) / (2 * step)


def _read(loss: Tensor, rows: int) -> LossReading:
    reading = read_loss(loss, rows)
    if reading is None:
        raise InfluenceError(
            "scores of tokens by label need a loss whose terms can be read: cross entropy, NLL, MSE or binary cross "
            "entropy with logits, alone and without label smoothing; this one is of another form."
        )
    return reading


@contextlib.contextmanager
def _replaced(
    module: nn.Module, parameters: Mapping[nn.Parameter, Tensor], by: Callable[[nn.Parameter], Tensor]
) -> Iterator[None]:
    """Lets the module compute with other tensors in place of some of its parameters."""
    others = {p: by(p) for p in parameters}
    places = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None and p in others
    ]
    try:
        for owner, name, p in places:
            owner._parameters[name] = others[p]  # type: ignore[assignment]  # as torch.func.functional_call does
        yield
    finally:
        for owner, name, p in places:
            owner._parameters[name] = p
