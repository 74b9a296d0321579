"""What the package asks of a Lightning Trainer: a module's loss, its precision and transfers, the steps ahead."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ine_callback.errors import QueryError

# by name: those of the package pytorch_lightning are other classes
_KNOWN = {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"}
_UNKNOWN = {"DeepSpeedStrategy", "XLAStrategy"}  # subclasses of DDP's: one splits gradients, one was never tried


class ModuleLoss:
    """The module's own loss of a batch: ``validation_step`` where it returns one, else ``training_step``.

    Args:
        module: The module.
        owner: Class named in messages.
    """

    def __init__(self, module: LightningModule, owner: str) -> None:
        self._owner = owner
        self._step: Literal["validation_step", "training_step"] | None = None
        self._automatic = module.automatic_optimization

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
                f"{self._owner}: {type(module).__name__} optimizes by hand: its training_step cannot be asked for "
                "a loss; return the loss from validation_step, or pass a callable query (module, batch) -> scalar."
            )
        return call_step(module, name, batch)


def call_step(module: Any, name: str, batch: Any) -> Any:
    """What a step of the module returns for a batch, as the first of its loader."""
    step = getattr(module, name)
    parameters = list(inspect.signature(step).parameters.values())[1:]
    # batch_idx and dataloader_idx, whatever the user calls them
    indices = [0 for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return step(batch, *indices)


def _loss_of(output: Any) -> Tensor | None:
    value = output.get("loss") if isinstance(output, Mapping) else output
    return value if isinstance(value, Tensor) and value.numel() == 1 else None


def is_known(strategy: Strategy) -> bool:
    """Whether whole gradients can be had under it."""
    names = {kind.__name__ for kind in type(strategy).__mro__}
    return bool(names & _KNOWN) and not names & _UNKNOWN


def splits_tensors(strategy: Strategy) -> bool:
    """Whether several processes work on the same rows (tensor parallelism)."""
    mesh = getattr(strategy, "_device_mesh", None)
    return mesh is not None and "tensor_parallel" in mesh.mesh_dim_names and mesh["tensor_parallel"].size() > 1


def overrides(owner: object, hook: str) -> bool:
    """Whether a module or datamodule has a hook of its own; under either name of Lightning."""
    home: str = getattr(owner, hook).__module__
    return not home.startswith(("lightning.pytorch.core.", "pytorch_lightning.core."))


@contextmanager
def evaluating(trainer: Trainer) -> Iterator[None]:
    """The trainer's precision, and the stage in which the module's hooks leave augmentation out."""
    stage, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING
    try:
        with trainer.precision_plugin.forward_context():
            yield
    finally:
        trainer.state.stage = stage


def transferred(trainer: Trainer, batch: Any) -> Any:
    """What Lightning does to a batch before a step sees it: precision, hooks, device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def unscale(trainer: Trainer) -> Tensor | None:
    """The inverse loss scale under float16, on the device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    scale = scaler._scale if scaler._scale is not None else torch.tensor(scaler._init_scale)
    return 1.0 / scale


def steps_ahead(trainer: Trainer) -> int:
    """Optimizer steps planned from here on; 0 where nobody knows."""
    steps = trainer.estimated_stepping_batches
    return 0 if steps == float("inf") else max(0, int(steps) - trainer.global_step)


def restarts_in_an_epoch(trainer: Trainer) -> bool:
    """Whether a resumed run takes up an epoch at its first batch again, having trained on some of it before."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    loaders = tree_leaves(trainer.train_dataloader)
    return 0 < done < trainer.num_training_batches and not all(isinstance(loader, _Stateful) for loader in loaders)


def schedulers_of(trainer: Trainer) -> Sequence[tuple[Any, int]]:
    """Each scheduler with the number of optimizer steps between its own steps."""
    batches = trainer.num_training_batches
    per_epoch = 1 if batches == float("inf") else -(-int(batches) // trainer.accumulate_grad_batches)
    return [
        (config.scheduler, config.frequency * (per_epoch if config.interval == "epoch" else 1))
        for config in trainer.lr_scheduler_configs
    ]
