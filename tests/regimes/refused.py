"""What is refused before the first step, and the words that name the remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .data import Ready, Stream, combined
from .optimizers import Together, plain
from .regime import BATCH, Classifier, Data, vectors


@dataclass
class Refusal:
    """A regime that cannot be recorded.

    Attributes:
        name: Its row of the table.
        reason: Why, for the table.
        told: What the message must hold: value and remedy.
    """

    name: str
    reason: str
    told: tuple[str, ...]
    module: Callable[[], Classifier] = Classifier
    data: Callable[[], Data] = vectors
    influence: dict[str, Any] = field(default_factory=dict)


class Sharing(Together):
    """Both optimizers have all parameters."""

    def made_optimizers(self) -> list[torch.optim.Optimizer]:
        return [make(self.parameters()) for make in self.makes]


def with_lbfgs() -> Classifier:
    return Together((plain, torch.optim.LBFGS))


class ByHand(Classifier):
    """Manual optimization without a validation step that returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None


def with_prelu() -> Classifier:
    return Classifier(torch.nn.Sequential(torch.nn.PReLU(5), torch.nn.Linear(5, 3)))


# refused likewise, in a process of its own: tests/regimes/test_launched.py
SPLIT = (
    "FSDPStrategy, DeepSpeed, tensor parallelism",
    "whole gradients cannot be had; strategy='ddp' and FSDP2 (ModelParallelStrategy) work",
)

REFUSED = [
    Refusal(
        "LBFGS",
        "its closure runs several times a step, so no batch belongs to the step",
        ("LBFGS", "use SGD, Adam or AdamW"),
        lambda: Classifier(optimizer=torch.optim.LBFGS),
    ),
    Refusal(
        "LBFGS as one of several optimizers",
        "as LBFGS alone",
        ("LBFGS", "use SGD, Adam or AdamW"),
        with_lbfgs,
    ),
    Refusal(
        "two optimizers that share parameters",
        "a gradient is applied twice, at two rates",
        ("net.0.weight", "give each parameter to one optimizer"),
        Sharing,
    ),
    Refusal(
        "manual optimization, query 'val', validation_step returns nothing",
        "its training_step takes optimizer steps, so it cannot be called for a loss; a callable query works",
        ("ByHand", "return the loss from validation_step", "callable query"),
        ByHand,
    ),
    Refusal(
        "iterable dataset without row_fn",
        "a stream has no row indices",
        ("iterable dataset Stream", "row_fn="),
        data=lambda: vectors(lambda items: DataLoader(Stream(items), BATCH)),
    ),
    Refusal(
        "batch_size=None without row_fn",
        "the dataset makes the batches, so no index is a row's",
        ("batch_size=None", "row_fn="),
        data=lambda: vectors(lambda items: DataLoader(Ready(items), batch_size=None)),
    ),
    Refusal(
        "CombinedLoader without row_fn",
        "two datasets' rows have no common numbers",
        ("2 training loaders", "row_fn="),
        data=lambda: vectors(combined),
    ),
    Refusal(
        "uncaptured='raise' and a layer without a capture",
        "the user asked for it",
        ("net.0.weight", "uncaptured='warn' or 'fallback'"),
        with_prelu,
        influence={"uncaptured": "raise"},
    ),
]
