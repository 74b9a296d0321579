"""The proof: do the captured per-row gradients add up to what autograd brings each parameter?

The gradient is read where autograd hands it over: before it is accumulated, averaged over processes, unscaled, clipped.
So no factor is left to guess, and a proof needs one parameter's sum at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ine_callback.capture.attributes import own_parameters, plain_parameters
from ine_callback.capture.blocks import Block
from ine_callback.capture.layers import layer_function
from ine_callback.capture.passes import counts
from ine_callback.capture.per_sample_gradients import GradSample, widened

_CANCELLED = 1e-2
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
_PARALLEL = 0.98  # cosine from which what is left over is taken for a penalty's gradient


def agree(shares: Tensor, gradient: Tensor) -> bool:
    """Whether the rows' shares [b, *shape] of one parameter add up to its gradient."""
    rest, cancelled = (shares.sum(0) - gradient).norm(), _CANCELLED * shares.norm()
    tolerance = _TOLERANCE.get(gradient.dtype, 1e-1)
    return bool(rest <= tolerance * torch.maximum(gradient.norm(), cancelled))


class Proof:
    """Compares what backward passes bring each parameter with the sums of its records.

    Args:
        fail: Called with an exception raised in a hook, so that the backward pass itself goes on.
        unscale: Factor that undoes the loss scaling, which the records are already free of.
        keep: Whether to keep the gradients, for the proof of the fallback.
    """

    def __init__(self, fail: Callable[[Exception], None], unscale: Tensor | None, keep: bool) -> None:
        self._fail, self._unscale, self._keep = fail, unscale, keep
        self._handles: dict[nn.Parameter, RemovableHandle] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._found: dict[nn.Parameter, Tensor] = {}
        self._squares: dict[Block, Tensor] = {}
        self._blocks: dict[nn.Parameter, Block] = {}
        self.kept: dict[nn.Parameter, Tensor] = {}

    def watch(self, parameter: nn.Parameter, known_as: nn.Parameter) -> None:
        """Reads the gradients of a parameter, which FSDP2 puts in the place of the one it is known as."""
        if parameter.requires_grad and parameter not in self._handles and not parameter.is_complex():
            self._handles[parameter] = parameter.register_hook(lambda grad: self._meet(known_as, parameter, grad))

    def take(self, block: Block, grad_sample: GradSample) -> None:
        """Takes one record of the running pass."""
        wide = grad_sample.wide()
        for parameter, part in zip(block.parameters, block.from_layout(wide.total()), strict=True):
            self._sums[parameter] = self._sums[parameter] + part if parameter in self._sums else part
            self._blocks[parameter] = block
        self._squares[block] = self._squares.get(block, 0) + wide.squared_norms().sum()

    def _meet(self, known_as: nn.Parameter, parameter: nn.Parameter, grad: Tensor) -> None:
        """All uses of the parameter in this pass are over: its records against its gradient."""
        try:
            if counts(parameter):  # otherwise asked for by torch.autograd.grad
                self.compare(known_as, parameter, grad)
        except Exception as error:  # the training run is sacred
            self._fail(error)

    def compare(self, known_as: nn.Parameter, parameter: nn.Parameter, grad: Tensor) -> None:
        """Compares a parameter's whole gradient of one pass with the sum of its records."""
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            found = widened(grad.detach().to_dense() if grad.is_sparse else grad.detach())
            if self._unscale is not None:
                found = found * self._unscale
            if self._keep:
                before = self.kept.get(known_as)
                self.kept[known_as] = found.clone() if before is None else before + found
            rest = found - self._sums.pop(known_as).to(found) if known_as in self._sums else found
            value = widened(parameter.detach())
            squares = [x.square().sum() for x in (found, rest, value)]
            penalties = [(rest * value).sum(), (rest * value.sign()).sum()]
            numbers = torch.stack([*squares, *penalties]).double()
            self._found[known_as] = self._found[known_as] + numbers if known_as in self._found else numbers

    def forget(self) -> None:
        """What was met so far was thrown away."""
        self.kept.clear()

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def judge(self, blocks: Iterable[Block], half: bool, twice: bool) -> tuple[dict[Block, str], set[Block], bool]:
        """The blocks that are wrong, with the reason; all that were met; and whether all gradients were finite.

        Args:
            blocks: Those recorded.
            half: Whether a pass ran in half precision somewhere, which widens the tolerance.
            twice: Whether a gradient was itself made differentiable.
        """
        owners = {p: block for block in blocks for p in block.parameters} | self._blocks
        met = [p for p in self._found if p in owners]
        table = torch.stack([*self._found.values()]).cpu() if self._found else torch.zeros(0, 5)
        finite = bool(table[:, 0].isfinite().all())
        wrong, numbers = {}, dict(zip(self._found, table, strict=True))
        seen = dict.fromkeys(owners[p] for p in [*met, *self._sums])
        for block in seen:
            parts = [numbers[p] for p in block.parameters if p in numbers]
            if any(p in self._sums for p in block.parameters) or not parts:
                wrong[block] = "autograd brought it no gradient, though its layer was part of the backward pass"
                continue
            total = torch.stack(parts).sum(0)
            # rows that cancel (a bias before BatchNorm, an attention key's) leave only rounding: compare with them
            size = max(float(total[0]) ** 0.5, _CANCELLED * float(self._squares.get(block, 0)) ** 0.5)
            error = float(total[1]) ** 0.5 / size if size else 0.0
            tolerance = _TOLERANCE[torch.bfloat16] if half else _TOLERANCE.get(block.parameters[0].dtype, 1e-1)
            if not error <= tolerance:
                wrong[block] = _reason(block, parts, error, twice)
        return wrong, set(seen), finite


def _reason(block: Block, parts: Sequence[Tensor], error: float, twice: bool) -> str:
    """Why a block's records miss part of its gradient, from the sums that :class:`Proof` makes."""
    what = f"its per-row gradients add up to something else (relative error {error:.1g}): "
    if _parallel(block, parts, squares=lambda size, value: value, place=3):
        return what + (
            "what is missing is a multiple of the weight itself, so the loss holds an L2 penalty on it; use the "
            "optimizer's weight_decay instead"
        )
    if _parallel(block, parts, squares=lambda size, value: size, place=4):
        return what + (
            "what is missing is a multiple of the weight's signs, so the loss holds an L1 penalty on it; shrink "
            "the weights after the optimizer's step instead"
        )
    if twice:
        return what + (
            "the loss holds a gradient (create_graph=True: a gradient penalty, forces), whose own derivative reaches "
            "the weight through no layer's call"
        )
    return what + "the weight is also used outside of its module's own call, or its layer function is wrong"


def _parallel(block: Block, parts: Sequence[Tensor], squares: Callable[[float, float], float], place: int) -> bool:
    """Whether what is missing of each parameter is a multiple of its values, or of their signs."""
    if block.elements == 1 or len(parts) != len(block.parameters):
        return False
    cosines = []
    for parameter, part in zip(block.parameters, parts, strict=True):
        _, rest, value, *_ = part.tolist()
        size = (rest * squares(float(parameter.numel()), value)) ** 0.5
        cosines.append(abs(float(part[place])) / size if size else 1.0)
    return min(cosines) > _PARALLEL


def uncaptured(
    module: nn.Module,
    captured: set[nn.Parameter],
    reasons: Mapping[str, str],
    used: set[nn.Parameter] | None = None,
) -> dict[str, str]:
    """Trainable parameters with a gradient but without records -> why.

    Args:
        module: The model after a backward pass.
        captured: Parameters of the blocks that passed.
        reasons: Module name -> why it was dropped.
        used: Parameters with a gradient, where it is not in ``.grad``.
    """
    if used is None:
        used = {p for p in module.parameters() if p.grad is not None}
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        for p in own_parameters(child).values():
            owners.setdefault(p, []).append((name, child))
    out = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or parameter in captured or parameter not in used or not parameter.numel():
            continue
        users = owners.get(parameter, [])
        told = [reasons[owner] for owner, _ in users if owner in reasons]
        out[name] = told[0] if told else _why(name, [child for _, child in users])
    return out


def _why(name: str, users: Sequence[nn.Module]) -> str:
    kind = type(users[-1]).__name__ if users else "a parameter of no module"
    if ".parametrizations." in f".{name}":
        return "a weight is computed from it by a parametrization, so no layer's call shows its rows' gradients"
    own = name.rpartition(".")[2]
    if users and own not in plain_parameters(users[-1]):
        return f"'{own}' is a property of {kind}, which computes what the layer works with"
    if users and layer_function(users[-1]) is not None and own not in ("weight", "bias"):
        return f"{kind} computes with it in a way that its layer function does not know (weight_norm, prune, a scale)"
    return f"no capture for {kind} (register one with @register_layer, or its forward is never called)"


def fraction_of(module: nn.Module, names: Iterable[str]) -> float:
    """The share of the trainable parameters that the named ones hold."""
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    return sum(sizes[name] for name in names if name in sizes) / max(1, sum(sizes.values()))
