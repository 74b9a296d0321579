"""Where the labels of a loss's terms stand in a batch: a causal language model's are its tokens, moved by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def label_offset(batch: Any, labels: Tensor, counted: Tensor) -> int | None:
    """By how many positions the terms' labels are ahead: 0, or 1 where the model shifts them; None if not found.

    Args:
        batch: The batch.
        labels: Of the loss's terms [b, T].
        counted: Which terms count in the loss [b, T].

    Example:
        >>> import torch
        >>> tokens, all_terms = torch.tensor([[5, 6, 7]]), torch.ones(1, 2, dtype=torch.bool)
        >>> label_offset({"input_ids": tokens}, tokens[:, 1:], all_terms)
        1
    """
    rows, terms = labels.shape
    for leaf in tree_leaves(batch):
        if not isinstance(leaf, Tensor) or leaf.dim() != 2 or len(leaf) != rows or leaf.is_floating_point():
            continue
        for offset in (0, 1):
            width = leaf.shape[1] - offset
            if terms not in (width, width + offset) or bool(counted[:, width:].any()):
                continue
            same = (leaf[:, offset:].to(labels.device) == labels[:, :width]) | ~counted[:, :width]
            if bool(same.all()):
                return offset
    return None
