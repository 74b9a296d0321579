"""Regimes of several processes: ``python -m tests.regimes.together FOLDER [NAME ...]`` trains them.

A process of its own does it: a fork must not inherit threads of torch that ran before, and FSDP2 starts the command
again for its second process.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, Sampler

from ine_callback import InfluenceCallback
from ine_callback.curvature.kfac import KFAC
from ine_callback.distributed.sharding import whole
from ine_callback.recording.backward import BackwardPasses
from ine_callback.recording.observations import Pending
from ine_callback.scoring.signals import Signals
from tests.helpers.accidents import accident
from tests.helpers.identical import History, differing, fitted, unequal
from tests.helpers.once import once
from tests.helpers.vision import Vision

from .compiled import compiled, uncompiled
from .harness import QUIET, Run, Verdict, Watch, judged, recorder
from .models import VISION, series
from .optimizers import GAN
from .optimizers import Together as ByTurns
from .options import with_adamw
from .reference import Event
from .regime import BATCH, Classifier, Data, Regime, adam, vectors

ROOT = Path(__file__).parents[2]
# before a pass of the model's own, after one, before the joining of visits, and in the first pass of a batch
BROKEN = [(BackwardPasses, "start_batch"), (Signals, "settle"), (Pending, "take"), (KFAC, "observe")]


class Shares(Sampler[list[int]]):
    """Batches of other sizes in each process: 20 rows as 4, 3, 3 in the first and 2, 5, 3 in the second."""

    sizes = (4, 3, 3), (2, 5, 3)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        start = 10 * rank
        for size in self.sizes[rank]:
            yield list(range(start, start + size))
            start += size


def of_uneven(items: Dataset[Any]) -> DataLoader[Any]:
    return DataLoader(items, batch_sampler=Shares())


def of_nineteen(items: Dataset[Any]) -> DataLoader[Any]:
    return DataLoader(torch.utils.data.Subset(items, range(19)), BATCH, shuffle=True)


def nineteen() -> Data:
    data = vectors(of_nineteen)
    data.items = data.train.dataset
    return data


def _two(**options: Any) -> Any:
    return lambda: {"strategy": "ddp_fork", "devices": 2, **options}


FORKED = [
    Regime("ddp, 2 processes", "processes", trainer=_two(), processes=2, tolerance=1e-5),
    Regime("ddp, AdamW", "processes", with_adamw, trainer=_two(), processes=2, tolerance=1e-5),
    Regime("ddp, padded sampler", "processes", data=nineteen, trainer=_two(), processes=2, tolerance=1e-5),
    Regime(
        "ddp, batches of other sizes in each process",
        "processes",
        data=lambda: vectors(of_uneven),
        trainer=_two(use_distributed_sampler=False),
        processes=2,
        tolerance=1e-5,
    ),
    Regime(
        "ddp, accumulated (no_sync) and clipped",
        "processes",
        trainer=_two(accumulate_grad_batches=2, gradient_clip_val=0.3),
        processes=2,
        tolerance=1e-5,
    ),
    Regime(
        "ddp, ViT of bare parameters",
        "processes",
        lambda: Classifier(Vision()),
        series,
        trainer=_two(),
        processes=2,
        tolerance=1e-5,
        left_out=VISION,
    ),
    Regime("ddp, two optimizers", "processes", ByTurns, trainer=_two(), processes=2, tolerance=1e-5),
    Regime(
        "ddp, GAN, not toggled",
        "processes",
        lambda: GAN(first="generator"),
        trainer=lambda: {"strategy": "ddp_fork_find_unused_parameters_true", "devices": 2},
        processes=2,
        tolerance=1e-5,
    ),
    Regime(
        "ddp, torch.compile",
        "processes",
        lambda: compiled(Classifier(), backend="eager"),
        trainer=_two(),
        processes=2,
        slow=True,
        plain_form=uncompiled,
    ),
    Regime("ddp, bf16-mixed", "processes", trainer=_two(precision="bf16-mixed"), processes=2, tolerance=0.05),
    Regime(
        "ddp, early stopping",
        "processes",
        trainer=_two(max_epochs=9, callbacks=[EarlyStopping("val", patience=1, min_delta=9.0)]),
        processes=2,
        note="training stopped after",
        tolerance=1e-5,
    ),
]


class Sharded(Classifier):
    """Split over the processes by FSDP2: each linear layer, and what remains."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class OneUnit(Classifier):
    """Split as a whole: the outermost unit keeps its parameters gathered after a forward pass."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _fsdp(**options: Any) -> Any:
    size = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    return lambda: {"strategy": ModelParallelStrategy(**size), "devices": 2, **options}


LAUNCHED = [
    Regime("FSDP2", "processes", Sharded, trainer=_fsdp(), processes=2, tolerance=1e-5),
    Regime("FSDP2, one unit", "processes", OneUnit, trainer=_fsdp(), processes=2, tolerance=1e-5, slow=True),
    Regime(
        "FSDP2, AdamW, accumulated and clipped",
        "processes",
        lambda: Sharded(optimizer=adam),
        trainer=_fsdp(accumulate_grad_batches=2, gradient_clip_val=0.3),
        processes=2,
        tolerance=1e-5,
        slow=True,
    ),
]
TOGETHER = [*FORKED, *LAUNCHED]


class Dump(L.Callback):
    """Saves what a process left; the processes end with the fit."""

    def __init__(self, file: Path, watch: Watch, history: History, influence: InfluenceCallback | None) -> None:
        self.file, self.watch, self.history, self.influence = file, watch, history, influence

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report = None if self.influence is None else self.influence.report
        last = {name: value.clone() for name, value in pl_module.state_dict().items()}
        left, last = apply_to_collection((fitted(trainer, self.history), last), torch.Tensor, whole)
        file = self.file.with_name(f"{self.file.name}-{trainer.global_rank}")
        torch.save((left, self.watch.events, report, last), file)


def train(regime: Regime, file: Path, influence: InfluenceCallback | None) -> None:
    """Trains in processes that leave ``file``-0, ``file``-1, …"""
    L.seed_everything(11, verbose=False)
    data, module = regime.data(), regime.module()
    watch, history, options = Watch(data), History(), {**QUIET, **regime.trainer()}
    own = [] if influence is None else [influence]
    callbacks = [*own, *options.get("callbacks", []), watch, history, Dump(file, watch, history, influence)]
    L.Trainer(**options | {"callbacks": callbacks}).fit(module, data.train, data.val)


def break_down(regime: Regime, folder: Path) -> None:
    """Trains while one of our methods fails in the second process, at its third call."""
    for owner, name in BROKEN:
        with accident(owner, name, 2, lambda: torch.distributed.get_rank() == 1):
            train(regime, folder / name, InfluenceCallback(["val", "self"], refresh_every=1))


class Ends(L.Callback):
    """Ends the training after an epoch as if it were for good."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def resume(folder: Path) -> None:
    """Trains as a whole, in part and on from there; with the discount."""
    for name, last in (("whole", None), ("part", 1), ("resumed", None)):
        L.seed_everything(11, verbose=False)
        data, module = vectors(), Classifier()
        watch, history = Watch(data), History()
        influence = InfluenceCallback(["val", "self"], refresh_every=2, curvature_every=1, on_error="raise")
        kept = folder / ("whole" if name == "whole" else "parts")
        ends = [] if last is None else [Ends(last)]
        callbacks = [*ends, influence, ModelCheckpoint(kept, save_last=True), watch, history]
        callbacks.append(Dump(folder / name, watch, history, influence))
        options = {**QUIET, **_two()(), "enable_checkpointing": True, "callbacks": callbacks}
        ckpt = kept / "last.ckpt" if name == "resumed" else None
        L.Trainer(**options).fit(module, data.train, data.val, ckpt_path=ckpt)


def trained(regime: Regime | None = None) -> Path:
    """Where it was trained, with and without the callback; without a regime, where all in forked processes were."""
    names = [regime.name] if regime in LAUNCHED else []

    def train_all(folder: Path) -> None:
        command = [sys.executable, "-m", "tests.regimes.together", str(folder), *names]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert not done.returncode, done.stderr[-5000:]

    return once(f"launched-{TOGETHER.index(regime)}" if names else "forked", train_all)


def examine_together(regime: Regime) -> Verdict:
    """The first process's verdict; all must have the same report, to the last bit."""
    folder, number = trained(regime), TOGETHER.index(regime)
    plain, recorded = ([loaded(folder / f"{number}-{kind}", r) for r in range(2)] for kind in ("plain", "recorded"))
    events = [part[1] for part in plain]
    even = all(len(a.rows) == len(b.rows) for a, b in zip(*events, strict=True))
    L.seed_everything(11, verbose=False)
    data, first, last = regime.data(), regime.module(), regime.module()
    last.load_state_dict(plain[0][3])
    run = Run(plain[0][0], _merged(events, even), data, first, last)
    verdict = judged(regime, run, recorded[0][0], recorded[0][2], [], 1 if even else 2)
    verdict.changed += differing(plain[1][0], recorded[1][0])
    verdict.changed += [f"the processes' reports differ in {name}" for name in unequal(*(part[2] for part in recorded))]
    return verdict


def loaded(file: Path, rank: int) -> Any:
    return torch.load(file.with_name(f"{file.name}-{rank}"), weights_only=False)


def _merged(events: list[list[Event]], even: bool) -> list[Event]:
    """The processes' batches as one batch, or one after the other."""
    out = []
    for one, other in zip(*events, strict=True):
        assert one.kind == other.kind
        if one.kind == "backward" and even:
            out.append(replace(one, rows=one.rows + other.rows))
        else:
            out += [one, other] if one.kind == "backward" else [one]
    return out


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for number, regime in enumerate(TOGETHER):
        if regime.name in names or (not names and regime in FORKED):
            train(regime, folder / f"{number}-plain", None)
            train(regime, folder / f"{number}-recorded", recorder(regime))
        if regime.name in names and regime is LAUNCHED[0]:
            break_down(regime, folder)
    if not names:
        resume(folder)


if __name__ == "__main__":
    main()
