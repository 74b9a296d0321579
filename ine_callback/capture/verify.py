"""The first step's proof: do the captured per-row gradients add up to what autograd put into each parameter?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ine_callback.capture.attributes import own_parameters, plain_parameters
from ine_callback.capture.blocks import Block
from ine_callback.capture.layers import layer_function
from ine_callback.capture.per_sample_gradients import Record
from ine_callback.distributed.processes import Lockstep
from ine_callback.distributed.sharding import whole

_CANCELLED = 1e-2
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}


def wrong_blocks(held: Iterable[tuple[Block, Record]], half: bool, processes: Lockstep) -> dict[Block, str]:
    """Blocks whose rows' gradients do not add up to the parameters' ``grad``, with the reason.

    A weight used outside its own module's call, a call that no hook saw, or a layer function with a mistake shows here.
    One scale common to all blocks is allowed (clipping, loss scaling).

    Args:
        held: The records of one backward pass into zeroed gradients, each with its block.
        half: Whether the pass ran in half precision somewhere, which widens the tolerance.
        processes: Those that train together; blocks that not all of them used are not looked at.
    """
    totals: dict[Block, Tensor] = {}
    squares: dict[Block, Tensor] = {}
    for block, record in held:
        wide = record.wide()
        totals[block] = totals[block] + wide.total() if block in totals else wide.total()
        squares[block] = squares.get(block, 0) + wide.squared_norms().sum()
    known = [block for block in totals if all(p.grad is not None for p in block.parameters)]
    names = processes.common(block.key for block in known)
    common = sorted((block for block in known if block.key in names), key=lambda block: block.key)
    pairs = {block: (_gradient(block, totals[block].dtype), totals[block]) for block in common}
    if _averaged([grad for grad, _ in pairs.values()], processes):
        processes.average(total for _, total in pairs.values())
    if not pairs:
        return {}
    ratios = torch.stack([(t * g).sum() / (t * t).sum().clamp_min(1e-30) for g, t in pairs.values()])
    scale = ratios[ratios != 0].median() if bool((ratios != 0).any()) else ratios.new_ones(())
    wrong = {}
    for block, (grad, total) in pairs.items():
        # rows that cancel (a bias before BatchNorm, an attention key's) leave only rounding: measure against the rows
        size = max(float(grad.norm()), _CANCELLED * float(abs(scale) * squares[block].sqrt()))
        error = float((grad - scale * total).norm()) / size if size else 0.0
        tolerance = _TOLERANCE[torch.bfloat16] if half else _TOLERANCE.get(block.parameters[0].dtype, 1e-1)
        if not error <= tolerance:
            wrong[block] = (
                f"its per-row gradients add up to something else (relative error {error:.1g}): the weight is also used "
                "outside of its module's own call, or its layer function is wrong"
            )
    right = processes.common(block.key for block in pairs if block not in wrong)
    elsewhere = "its per-row gradients add up in this process, but not in another"
    return {b: wrong.get(b, elsewhere) for b in pairs if b.key not in right}


def _gradient(block: Block, dtype: torch.dtype) -> Tensor:
    grads = [whole(p.grad) for p in block.parameters if p.grad is not None]
    dense = [g.to_dense() if g.is_sparse else g for g in grads]
    return block.to_layout([g[None].to(dtype) for g in dense])[0]


def _averaged(gradients: Sequence[Tensor], processes: Lockstep) -> bool:
    """Whether all processes hold the same gradients: DDP has averaged them (under no_sync it waits with that)."""
    if processes.count == 1 or not gradients:
        return False
    return processes.same(torch.stack([g.double().square().sum() for g in gradients]).sum())


def uncaptured(module: nn.Module, captured: set[nn.Parameter], reasons: Mapping[str, str]) -> dict[str, str]:
    """Trainable parameters with a gradient but without records -> why.

    Args:
        module: The model after its first backward pass.
        captured: Parameters of the blocks that passed.
        reasons: Module name -> why it was dropped.
    """
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        for p in own_parameters(child).values():
            owners.setdefault(p, []).append((name, child))
    out = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or parameter in captured or parameter.grad is None or not parameter.numel():
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


def share_of(module: nn.Module, names: Iterable[str]) -> float:
    """The share of the trainable parameters that the named ones hold."""
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    return sum(sizes[name] for name in names if name in sizes) / max(1, sum(sizes.values()))
