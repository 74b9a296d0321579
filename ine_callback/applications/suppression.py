"""Training without chosen tokens: a loss that pushes them away, and a data set that says which they are.

IF-Guide (arXiv 2506.01790) trains on ``sum of l_j over other tokens - weight * sum of l_j over chosen ones``. That has
no lower bound: a small language model went from perplexity 3.4 to 1e75. Here the loss of a chosen token counts up to a
cap, by default that of a uniform prediction; beyond it has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ine_callback.applications.token_mask import TokenMask
from ine_callback.errors import InfluenceError

Penalty = Literal["ascent", "unlikelihood", "ignore"]


def suppressed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    weight: float = 1.0,
    penalty: Penalty = "ascent",
    cap: float | Literal["uniform"] | None = "uniform",
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy in which chosen tokens are pushed away; with none chosen, plain cross entropy.

    Args:
        logits: [..., V].
        labels: [...]; as for :func:`torch.nn.functional.cross_entropy` they are the tokens to predict.
        mask: Which labels to suppress [...].
        weight: Of a suppressed token's penalty.
        penalty: ``"ascent"``: minus its loss, up to the cap. ``"unlikelihood"``: ``-log(1 - p)``, which has a lower
            bound by itself. ``"ignore"``: none, the token is left out.
        cap: Loss beyond which ``"ascent"`` pushes no further: a number, ``"uniform"``: log V, or None: no bound, as in
            the paper, which diverges.
        ignore_index: Label of positions that count for nothing.

    Returns:
        The mean over the labels that are not ignored.

    Raises:
        InfluenceError: For shapes that do not fit, or an unknown penalty.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(3, 2), torch.tensor([0, 1, -100])
        >>> suppressed_cross_entropy(logits, labels, torch.tensor([False, True, False]))  # (.693 - .693) / 2
        tensor(0.)
    """
    if logits.shape[:-1] != labels.shape or labels.shape != mask.shape:
        raise InfluenceError(
            f"suppressed_cross_entropy: logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and mask "
            f"{tuple(mask.shape)} do not belong together; shift all of them alike: logits[:, :-1], labels[:, 1:], "
            "mask[:, 1:]."
        )
    if penalty not in get_args(Penalty):
        raise InfluenceError(
            f"suppressed_cross_entropy: penalty={penalty!r} is none of {', '.join(get_args(Penalty))}."
        )
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    if penalty == "ascent":
        limit = math.log(logits.shape[-1]) if cap == "uniform" else cap
        instead = -weight * (losses if limit is None else losses.clamp(max=limit))
    elif penalty == "unlikelihood":
        instead = weight * _unlikelihood(logits.flatten(0, -2), labels.flatten().clamp_min(0))
    else:
        instead = torch.zeros_like(losses)
    counted = labels.flatten() != ignore_index
    return torch.where(mask.flatten() & counted, instead, losses).sum() / counted.sum()


def _unlikelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log(1 - p)`` by the other labels' logits, which keeps its gradient where p is 1 to machine precision."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.logsumexp(1) - others.logsumexp(1)


class SuppressTokens(Dataset[Any]):
    """A data set whose items say which of their tokens are to be suppressed.

    Args:
        dataset: Rows as they were scored, in their order: tensors of tokens, tuples, or mappings.
        mask: The tokens.
        labels: Key or position of a row's labels in an item. None: ``"labels"`` or ``"input_ids"`` of a mapping, the
            last part of a tuple.
        key: Name of the mask in a mapping. In a tuple it is the last part.

    Raises:
        InfluenceError: If a chosen token is another one than when it was scored.

    Example:
        >>> import numpy as np, torch
        >>> one = np.array([1])
        >>> rows = SuppressTokens(torch.tensor([[5, 6], [7, 8]]), TokenMask(one, one, np.array([8]), tokens=4))
        >>> rows[1]
        (tensor([7, 8]), tensor([False,  True]))
    """

    def __init__(
        self, dataset: Any, mask: TokenMask, labels: str | int | None = None, key: str = "suppress_mask"
    ) -> None:
        self._dataset, self._mask, self._labels, self._key = dataset, mask, labels, key
        if len(mask) and int(mask.rows[-1]) >= len(dataset):
            raise InfluenceError(
                f"SuppressTokens: the mask has tokens of row {mask.rows[-1]}, and the data set {len(dataset)} rows; "
                "give the rows that were scored."
            )

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> Any:
        item = self._dataset[row]
        labels = item
        if isinstance(item, Mapping):
            labels = item[self._labels or ("labels" if "labels" in item else "input_ids")]
        elif isinstance(item, tuple | list):
            labels = item[-1 if self._labels is None else self._labels]  # type: ignore[index]
        mask = torch.from_numpy(self._mask.of(row, np.asarray(labels)))
        if isinstance(item, Mapping):
            return {**item, self._key: mask}
        return (*item, mask) if isinstance(item, tuple | list) else (item, mask)
