"""Embeddings as plain functions of their weights: dense gradients, and no weight rewritten in place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TINY = 1e-7  # as torch's own renormalization


class DenseEmbeddings(TorchFunctionMode):
    """Inside, ``F.embedding`` and ``F.embedding_bag`` are dense, and batched and forward derivatives work.

    A sparse gradient cannot flow into one flat vector of weights. ``max_norm`` would rewrite that vector, a bag has no
    forward derivative, and ``scale_grad_by_freq`` is no gradient of the loss.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.embedding, F.embedding_bag):
            return func(*args, **kwargs or {})
        bound = inspect.signature(func).bind(*args, **kwargs or {})
        bound.apply_defaults()
        arguments = bound.arguments
        if func is F.embedding_bag:
            return _bag(arguments)
        weight = _shortened(arguments["weight"], arguments["max_norm"], arguments["norm_type"])
        return F.embedding(arguments["input"], weight, arguments["padding_idx"])


def _shortened(weight: Tensor, max_norm: float | None, norm_type: float) -> Tensor:
    """Embeddings no longer than ``max_norm``, with the gradient of the shortened ones, as in training."""
    if max_norm is None:
        return weight
    norm = weight.detach().norm(norm_type, 1, keepdim=True)
    shorter = weight.detach() * torch.where(norm > max_norm, max_norm / (norm + _TINY), 1.0)
    return weight + (shorter - weight.detach())


def _bag(arguments: dict[str, Any]) -> Tensor:
    """``F.embedding_bag`` out of ``F.embedding`` and sums."""
    ids, offsets = arguments["input"], arguments["offsets"]
    weight = _shortened(arguments["weight"], arguments["max_norm"], arguments["norm_type"])
    if ids.dim() == 2:
        bags, bag = len(ids), torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
    else:
        starts = offsets[:-1] if arguments["include_last_offset"] else offsets
        bags = len(starts)
        bag = torch.searchsorted(starts.contiguous(), torch.arange(len(ids), device=ids.device), right=True) - 1
    ids, scale = ids.flatten(), arguments["per_sample_weights"]
    padding = arguments["padding_idx"]
    counted = torch.ones_like(ids, dtype=torch.bool)
    if padding is not None:
        counted = ids != (padding if padding >= 0 else padding + arguments["weight"].shape[0])
    found = F.embedding(ids, weight)
    if arguments["mode"] == "max":
        return _largest(found.masked_fill(~counted[:, None], -torch.inf), bag, bags)
    if scale is not None:
        found = found * scale.flatten()[:, None]
    total = found.new_zeros(bags, found.shape[1]).index_add(0, bag, found * counted[:, None])
    if arguments["mode"] == "sum":
        return total
    size = torch.zeros(bags, dtype=total.dtype, device=ids.device).index_add(0, bag, counted.to(total.dtype))
    return total / size.clamp_min(1)[:, None]


def _largest(found: Tensor, bag: Tensor, bags: int) -> Tensor:
    """Largest entries of each bag; 0 where it is empty."""
    start = found.new_full((bags, found.shape[1]), -torch.inf)
    out = start.scatter_reduce(0, bag[:, None].expand_as(found), found, "amax")
    return out.masked_fill(out == -torch.inf, 0.0)
