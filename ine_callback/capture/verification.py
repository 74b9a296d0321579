"""Verification: do the per-sample gradients of each parameter add up to the gradient that autograd gives it?

A hook reads the gradient where autograd hands it over: before it is accumulated, averaged over processes, unscaled or
clipped. So the sums must be equal, without any factor, and each parameter is verified on its own. What a term of the
loss gives it that belongs to no row (a penalty on weights) is measured where the parameter enters that term.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ine_callback.capture.attributes import own_parameters, plain_parameters
from ine_callback.capture.bare.graph import Apart
from ine_callback.capture.bare.no_row import ApartGradients, Kind, KindsByParameter
from ine_callback.capture.blocks import Block
from ine_callback.capture.layers import layer_function
from ine_callback.capture.passes import adds_to_grad
from ine_callback.capture.per_sample_gradients import GradSample, widened
from ine_callback.capture.readable_nodes import SAVED_IS_READ
from ine_callback.utilities.isolation import compiled_parts

_CANCELLATION = 1e-2  # of the norm of all rows' gradients: what rounding leaves of rows that cancel
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
_COMPILED = "torch.compile runs it, where only layers with one input and one output are recorded"
_ELSEWHERE = (
    "change it in on_before_optimizer_step or configure_gradient_clipping (in a loop of your own: before the step), "
    "where it is measured"
)
_SEEN = "pass the loss to recorder.see(loss) before its backward pass"
_MIN_PENALTY_COSINE = 0.98  # between what is missing and a penalty's gradient, to name the penalty


def adds_up(contributions: Tensor, gradient: Tensor) -> bool:
    """Whether the rows' gradient contributions [b, *shape] of one parameter add up to its gradient."""
    missing, cancellation = (contributions.sum(0) - gradient).norm(), _CANCELLATION * contributions.norm()
    tolerance = _TOLERANCE.get(gradient.dtype, 1e-1)
    return bool(missing <= tolerance * torch.maximum(gradient.norm(), cancellation))


class Verification:
    """Compares the gradients of backward passes with the sums of per-sample gradients, parameter by parameter.

    Args:
        fail: Called with an exception of a hook, which is not raised into the backward pass.
        unscale: Factor that undoes the loss scaling; per-sample gradients are already unscaled.
        keep: Whether to keep the gradients, to verify the fallback with them.

    Attributes:
        gradients: The gradients of each parameter, if kept.
    """

    def __init__(self, fail: Callable[[Exception], None], unscale: Tensor | None, keep: bool) -> None:
        self._fail, self._unscale, self._keep = fail, unscale, keep
        self._handles: dict[nn.Parameter, RemovableHandle] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}  # of per-sample gradients that are not compared yet
        self._compared: dict[nn.Parameter, Tensor] = {}  # the numbers that compare makes
        self._squares: dict[Block, Tensor] = {}  # summed squared norms of the rows' gradients
        self._blocks: dict[nn.Parameter, Block] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self._apart = ApartGradients()
        self._kinds: dict[nn.Parameter, set[Kind]] = {}  # of operations apart from all uses that gave gradients
        self._expected: dict[nn.Parameter, Tensor] = {}  # gradients that hooks get after they were accumulated
        self._changed: set[nn.Parameter] = set()  # which such hooks have changed
        self._rests: dict[nn.Parameter, dict[Kind, Tensor]] = {}  # the gradients through them, if kept

    def watch_apart(self, parameter: nn.Parameter, apart: Apart) -> None:
        """Reads what an operation gives a parameter that may belong to no row."""
        self._apart.watch(parameter, apart)

    def watch(self, parameter: nn.Parameter, known_as: nn.Parameter) -> None:
        """Reads the gradients of a parameter. With FSDP2 it replaces, during a pass, the one it is known as."""
        if parameter.requires_grad and parameter not in self._handles and not parameter.is_complex():
            self._handles[parameter] = parameter.register_hook(lambda grad: self._on_grad(known_as, parameter, grad))

    def take(self, block: Block, grad_sample: GradSample) -> None:
        """Adds the per-sample gradients of one use in the running pass."""
        wide = grad_sample.wide()
        for parameter, part in zip(block.parameters, block.from_layout(wide.total()), strict=True):
            self._sums[parameter] = self._sums[parameter] + part if parameter in self._sums else part
            self._blocks[parameter] = block
        self._squares[block] = self._squares.get(block, 0) + wide.squared_norms().sum()

    def _on_grad(self, known_as: nn.Parameter, parameter: nn.Parameter, grad: Tensor) -> None:
        """Compares sum and gradient, when autograd has been through all uses of the parameter in this pass."""
        try:
            if adds_to_grad(parameter):  # else a gradient of torch.autograd.grad
                self.compare(known_as, parameter, grad)
                if parameter._post_accumulate_grad_hooks:
                    before = parameter.grad
                    self._expected[parameter] = grad.detach() + (0 if before is None else before.detach())
        except Exception as error:  # never raised into the training's backward pass
            self._fail(error)

    def end_pass(self) -> None:
        """Told when a pass is over: sees what hooks did to gradients after these were accumulated."""
        for parameter, expected in self._expected.items():
            found = parameter.grad
            if found is None or found.is_sparse or not torch.allclose(found, expected, equal_nan=True):
                self._changed.add(parameter)
        self._expected.clear()

    def compare(self, known_as: nn.Parameter, parameter: nn.Parameter, grad: Tensor) -> None:
        """Compares a parameter's whole gradient of one pass with the sum of its per-sample gradients."""
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            gradient = widened(grad.detach().to_dense() if grad.is_sparse else grad.detach())
            if self._unscale is not None:
                gradient = gradient * self._unscale
            if self._keep:
                before = self.gradients.get(known_as)
                self.gradients[known_as] = gradient.clone() if before is None else before + gradient
            missing = gradient - self._sums.pop(known_as).to(gradient) if known_as in self._sums else gradient
            value, rest = widened(parameter.detach()), missing - self._take_apart(known_as, gradient)
            squares = [x.square().sum() for x in (gradient, missing, value)]
            penalties = [(missing * value).sum(), (missing * value.sign()).sum()]
            numbers = torch.stack([*squares, *penalties, rest.square().sum()]).double()
            self._compared[known_as] = self._compared[known_as] + numbers if known_as in self._compared else numbers

    def _take_apart(self, parameter: nn.Parameter, like: Tensor) -> Tensor:
        """What the pass gave a parameter through operations that are apart from all uses."""
        found, unscale = self._apart.found.pop(parameter, {}), 1.0 if self._unscale is None else self._unscale
        self._kinds.setdefault(parameter, set()).update(found)
        total, rests = torch.zeros_like(like), self._rests.setdefault(parameter, {})
        for kind, gradient in found.items():
            rest = gradient.to(like) * unscale
            total += rest
            if self._keep:
                rests[kind] = rests[kind] + rest if kind in rests else rest
        return total

    def has_unknown(self, of_no_row: KindsByParameter) -> bool:
        """Whether a parameter got a gradient by an operation that is not known to belong to no row."""
        return any(not self._explained(p, of_no_row) for p in self._kinds)

    def _explained(self, parameter: nn.Parameter, of_no_row: KindsByParameter) -> bool:
        """Whether all that is apart from a parameter's uses belongs to no row."""
        return self._kinds.get(parameter, set()) <= of_no_row.get(parameter, set())

    def of_rows(self, of_no_row: KindsByParameter) -> dict[nn.Parameter, Tensor]:
        """The gradients of each parameter, if kept, without what belongs to no row."""
        out = {}
        for p, gradient in self.gradients.items():
            rests = self._rests.get(p, {}).items()
            out[p] = gradient - sum(rest for kind, rest in rests if kind in of_no_row.get(p, ()))
        return out

    def forget(self) -> None:
        """Forgets the gradients so far, which were removed."""
        self.gradients.clear()
        self._rests.clear()

    def close(self) -> None:
        """Removes the hooks."""
        self._apart.close()
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def judge(
        self, blocks: Iterable[Block], half: bool, double_backward: bool, of_no_row: KindsByParameter
    ) -> tuple[dict[Block, str], set[Block], bool]:
        """The blocks that are wrong, with the reason; all blocks compared; and whether all gradients were finite.

        Args:
            blocks: The recorded blocks.
            half: Whether a pass ran in half precision somewhere, which needs a larger tolerance.
            double_backward: Whether a gradient was itself made differentiable.
            of_no_row: Of each parameter, the kinds of operations that belong to no row.
        """
        owners = {p: block for block in blocks for p in block.parameters} | self._blocks
        table = torch.stack([*self._compared.values()]).cpu() if self._compared else torch.zeros(0, 6)
        finite = bool(table[:, 0].isfinite().all())
        wrong, numbers = {}, dict(zip(self._compared, table, strict=True))
        compared = dict.fromkeys(owners[p] for p in [*(p for p in self._compared if p in owners), *self._sums])
        for block in compared:
            parts = [numbers[p] for p in block.parameters if p in numbers]
            if not self._changed.isdisjoint(block.parameters):
                wrong[block] = f"a hook on it (register_post_accumulate_grad_hook) changes its gradient; {_ELSEWHERE}"
                continue
            if any(p in self._sums for p in block.parameters) or not parts:
                wrong[block] = "autograd gave it no gradient, though its layer was part of the backward pass"
                continue
            total = torch.stack(parts).sum(0)
            missing = total[5 if all(self._explained(p, of_no_row) for p in block.parameters) else 1]
            # rows that cancel (a bias before BatchNorm, or of keys) leave only rounding: compare with the rows
            size = max(float(total[0]) ** 0.5, _CANCELLATION * float(self._squares.get(block, 0)) ** 0.5)
            error = float(missing) ** 0.5 / size if size else 0.0
            tolerance = _TOLERANCE[torch.bfloat16] if half else _TOLERANCE.get(block.parameters[0].dtype, 1e-1)
            if not error <= tolerance:
                wrong[block] = _reason(block, parts, error, double_backward)
        return wrong, set(compared), finite

    def without_rows(self, of_no_row: KindsByParameter) -> set[nn.Parameter]:
        """Parameters that have no gradient but that of terms that belong to no row."""
        return {
            p
            for p, numbers in self._compared.items()
            if self._kinds.get(p) and self._explained(p, of_no_row)
            if float(numbers[5]) <= _TOLERANCE.get(p.dtype, 1e-1) ** 2 * float(numbers[0])
        }


def _reason(block: Block, parts: Sequence[Tensor], error: float, double_backward: bool) -> str:
    """Why per-sample gradients miss part of the gradient, from the numbers of :meth:`Verification.compare`."""
    what = f"its per-sample gradients add up to something else (relative error {error:.1g}): "
    if any(p._backward_hooks for p in block.parameters):
        return what + (f"a hook on the parameter (register_hook) changes its gradient; {_ELSEWHERE}")
    if _parallel(block, parts, squares=lambda size, value: value, place=3):
        return what + (
            f"what is missing is a multiple of the weight itself, so the loss holds an L2 penalty on it; {_SEEN}, or "
            "use the optimizer's weight_decay"
        )
    if _parallel(block, parts, squares=lambda size, value: size, place=4):
        return what + (
            f"what is missing is a multiple of the weight's signs, so the loss holds an L1 penalty on it; {_SEEN}, or "
            "shrink the weights after the optimizer's step"
        )
    if double_backward:
        return what + (
            "the loss holds a gradient (create_graph=True: a gradient penalty, forces), whose own derivative reaches "
            f"the weight through no layer's call, in no way that is known; {_SEEN} in a loop of your own"
        )
    return what + "the weight is also used outside of its module's own call, or its layer function is wrong"


def _parallel(block: Block, parts: Sequence[Tensor], squares: Callable[[float, float], float], place: int) -> bool:
    """Whether the missing part of each parameter's gradient is a multiple of its values, or of their signs."""
    if block.elements == 1 or len(parts) != len(block.parameters):
        return False
    cosines = []
    for parameter, part in zip(block.parameters, parts, strict=True):
        _, missing, value, *_ = part.tolist()
        size = (missing * squares(float(parameter.numel()), value)) ** 0.5
        cosines.append(abs(float(part[place])) / size if size else 1.0)
    return min(cosines) > _MIN_PENALTY_COSINE


def uncaptured(
    module: nn.Module,
    captured: set[nn.Parameter],
    reasons: Mapping[str, str],
    used: set[nn.Parameter] | None = None,
    unknown: Mapping[nn.Parameter, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Trainable parameters with a gradient but without per-sample gradients -> why.

    Args:
        module: The model after a backward pass.
        captured: Parameters of the verified blocks.
        reasons: Name of a module or bare parameter -> why it was dropped.
        used: Parameters with a gradient, where it is not in ``.grad``.
        unknown: Of parameters, an operation on them from which no rows' gradients can be read.
    """
    if used is None:
        used = {p for p in module.parameters() if p.grad is not None}
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        for p in own_parameters(child).values():
            owners.setdefault(p, []).append((name, child))
    compiled = {child for part in compiled_parts(module) for child in part.modules()}
    out = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or parameter in captured or parameter not in used or not parameter.numel():
            continue
        users = owners.get(parameter, [])
        known = [reasons[each] for each in (name, *(owner for owner, _ in users)) if each in reasons]
        why = _COMPILED if any(child in compiled for _, child in users) else _why(name, [child for _, child in users])
        operation = f"; it is used by {unknown[parameter]}" if unknown.get(parameter) else ""
        out[name] = known[0] if known else why + operation
    return out


def _why(name: str, users: Sequence[nn.Module]) -> str:
    kind = type(users[-1]).__name__ if users else "a parameter of no module"
    if ".parametrizations." in f".{name}":
        return "a weight is computed from it by a parametrization, so no layer's call has its per-sample gradients"
    leaf = name.rpartition(".")[2]
    if users and leaf not in plain_parameters(users[-1]):
        return f"'{leaf}' is a property of {kind}, which computes what the layer uses"
    if users and layer_function(users[-1]) is not None and leaf not in ("weight", "bias"):
        return f"{kind} uses it in a way that its layer function does not know (weight_norm, prune, a scale)"
    reason = f"no layer function for {kind} (register one with @register_layer), or its forward is never called"
    return reason if SAVED_IS_READ else f"{reason}; only torch 2.13 and newer let products that use it be read"


def fraction_of(module: nn.Module, names: Iterable[str], trained: Collection[nn.Parameter] = ()) -> float:
    """The fraction of all trainable parameters that the named ones are; ``trained``: though frozen for the moment."""
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad or p in trained}
    return sum(sizes[name] for name in names if name in sizes) / max(1, sum(sizes.values()))
