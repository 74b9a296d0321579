"""The module's own loss of a batch, computed by its steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor

from ine_callback.data.batches import lent
from ine_callback.errors import QueryError


class ModuleLoss:
    """The module's own loss of a batch: ``validation_step`` where it returns one, else ``training_step``.

    Args:
        module: The module.
        owner: Class named in messages.

    Attributes:
        batch_idx: What ``training_step`` gets as its batch's number.
    """

    def __init__(self, module: LightningModule, owner: str) -> None:
        self._owner = owner
        self._step: Literal["validation_step", "training_step"] | None = None
        self._automatic = module.automatic_optimization
        self.batch_idx = 0

    def __call__(self, module: Any, batch: Any) -> Tensor:
        if self._step is None:
            self._step = "training_step"
            found = _loss_of(self._call(module, "validation_step", batch))
            if found is not None and found.requires_grad:
                self._step = "validation_step"
                return found
        found = _loss_of(self._call(module, self._step, batch))
        if found is None:
            raise QueryError(
                f"{self._owner}: neither validation_step nor training_step of {type(module).__name__} returns a "
                "loss; return it, or pass a callable query (module, batch) -> scalar."
            )
        return found

    def training(self, module: Any, batch: Any) -> Tensor:
        """The training loss of a batch."""
        found = _loss_of(self._call(module, "training_step", batch))
        if found is None:
            raise QueryError(f"{self._owner}: training_step of {type(module).__name__} returned no loss.")
        return found

    def _call(self, module: Any, name: str, batch: Any) -> Any:
        if name == "training_step" and not self._automatic:
            raise QueryError(
                f"{self._owner}: {type(module).__name__} optimizes by hand: its training_step cannot be called for "
                "a loss; return the loss from validation_step, or pass a callable query (module, batch) -> scalar."
            )
        return call_step(module, name, batch, self.batch_idx if name == "training_step" else 0)


def call_step(module: Any, name: str, batch: Any, batch_idx: int = 0) -> Any:
    """What a step of the module returns for a batch of its first loader, which stays as it is."""
    step = getattr(module, name)
    parameters = list(inspect.signature(step).parameters.values())[1:]
    # batch_idx and dataloader_idx, whatever the user calls them
    indices = [0 for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return step(lent(batch), *[batch_idx, *indices[1:]][: len(indices)])


def _loss_of(output: Any) -> Tensor | None:
    value = output.get("loss") if isinstance(output, Mapping) else output
    return value if isinstance(value, Tensor) and value.numel() == 1 else None
