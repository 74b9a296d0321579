"""Attributions as tensors and plain types, for checkpoints that load under ``weights_only=True``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ine_callback.scores import Attribution, Check, LayerScores, QueryInfo, TokenScores

_PARTS = {"layers": LayerScores, "tokens": TokenScores}


def packed(found: Attribution) -> dict[str, Any]:
    """The attribution as tensors and plain types; :func:`unpacked` is the inverse."""
    state: dict[str, Any] = {}
    for name, value in vars(found).items():
        if name in ("queries", "checks"):
            value = [dict(vars(part)) for part in value]
        elif name in _PARTS and value is not None:
            value = {key: _tensor(part) for key, part in vars(value).items()}
        elif name in ("columns", "arrays"):
            value = {key: _tensor(part) for key, part in value.items()}
        state[name] = _tensor(value)
    return state


def unpacked(state: dict[str, Any]) -> Attribution:
    """The attribution from :func:`packed`'s state."""
    fields = {name: _array(value) for name, value in state.items()}
    fields["queries"] = tuple(QueryInfo(**query) for query in state["queries"])
    fields["checks"] = tuple(Check(**check) for check in state["checks"])
    for name, kind in _PARTS.items():
        if fields[name] is not None:
            fields[name] = kind(**{key: _array(part) for key, part in fields[name].items()})
    for name in ("columns", "arrays"):
        fields[name] = {key: _array(part) for key, part in fields[name].items()}
    return Attribution(**fields)


def _tensor(value: Any) -> Any:
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value
