"""What the package asks of a Lightning Trainer: its precision and transfers, the steps ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

# by name: those of the package pytorch_lightning are other classes
_KNOWN = {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"}
_UNKNOWN = {"DeepSpeedStrategy", "XLAStrategy"}  # subclasses of DDP's: one splits gradients, one was never tried


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


def touches_gradients(trainer: Trainer, module: LightningModule) -> bool:
    """Whether gradients may be changed after a backward pass: clipping, loss scaling, own code."""
    hooks = (
        "on_after_backward",
        "on_before_optimizer_step",
        "configure_gradient_clipping",
        "optimizer_step",
        "backward",
    )
    plugin = trainer.precision_plugin
    return (
        not module.automatic_optimization
        or bool(trainer.gradient_clip_val)
        or getattr(plugin, "scaler", None) is not None
        or any(not _lightnings(getattr(module, hook)) for hook in hooks)
        or any(not _lightnings(getattr(each, hook)) for each in _others(trainer) for hook in hooks[:2])
        or not all(_lightnings(type(each)) for each in (plugin, trainer.strategy))
    )


def _others(trainer: Trainer) -> list[Any]:
    """The callbacks but for the package's own."""
    return [each for each in trainer.callbacks if not type(each).__module__.startswith("ine_callback.")]  # type: ignore[attr-defined]


def _lightnings(one: Any) -> bool:
    """Whether a class or function is Lightning's own, under either of its names."""
    return str(one.__module__).startswith(("lightning.pytorch.", "pytorch_lightning."))


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
    """Optimizer steps planned from here on; of several optimizers, batches; 0 where it is unknown."""
    steps = trainer.estimated_stepping_batches
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    done = trainer.global_step if len(trainer.optimizers) == 1 else batches  # each of several counts its steps
    return 0 if steps == float("inf") else max(0, int(steps) - done)


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


def replaced(trainer: Trainer, recorded: Iterable[Optimizer]) -> str:
    """What to say of optimizers that the trainer got during the fit; nothing where there are none."""
    known = {id(one) for one in recorded}
    new = {type(one).__name__ for one in trainer.optimizers if id(one) not in known}
    told = f"the trainer got another optimizer ({', '.join(sorted(new))}) during the fit: its steps are not recorded"
    return f"{told}; return it from configure_optimizers" if new else ""
