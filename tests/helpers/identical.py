"""What a training leaves behind, and whether two leave the same, bit by bit."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from ine_callback import InfluenceReport


class History(L.Callback):
    """Every logged metric and learning rate of every step: a difference that heals before the end shows here."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.seen.append(({k: v.clone() for k, v in trainer.callback_metrics.items()}, rates))


def left_behind(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    return {
        "parameters and buffers": [v.clone() for v in model.state_dict().values()],
        "modes": [module.training for module in model.modules()],
        "optimizer": tree_leaves(optimizer.state_dict()),
        "random states": [torch.get_rng_state(), *np.random.get_state(), random.getstate()],
    }


def fitted(trainer: L.Trainer, history: History) -> dict[str, list[Any]]:
    found = left_behind(trainer.lightning_module, trainer.optimizers[0])
    found["optimizer"] = [leaf for each in trainer.optimizers for leaf in tree_leaves(each.state_dict())]
    return found | {"logged": tree_leaves(trainer.callback_metrics), "history": tree_leaves(history.seen)}


def differing(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> list[str]:
    """The kinds of things that differ; empty for identical trainings."""
    assert one.keys() == other.keys()
    return [kind for kind in one if not _equal(one[kind], other[kind])]


def unequal(one: InfluenceReport, other: InfluenceReport) -> list[str]:
    """The arrays that two reports do not share, to the last bit."""
    pairs = [(n, v, getattr(other.scores, n)) for n, v in vars(one.scores).items() if isinstance(v, np.ndarray)]
    return [name for name, a, b in pairs if not np.array_equal(a, b, equal_nan=True)]


def compare(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> None:
    assert not differing(one, other)


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
