"""The gradient store of several processes: each has its own rows' vectors, and together they are one process's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import FINE, GradientStore, InfluenceCallback, InfluenceReport, Recorder
from ine_callback.recording.store import reduce
from ine_callback.recording.store.recording import StoreRecording
from ine_callback.recording.store.vectors import RowVectors
from ine_callback.report import example_report
from tests.helpers.accidents import accident
from tests.helpers.once import spawned

ROWS, BATCH = 48, 8
WHOLE = GradientStore(bytes_per_row=4 + 4 * 512, dtype="float32")  # more numbers than there are parameters
BANDS = GradientStore(bytes_per_row=24, working=512)


class Classifier(L.LightningModule):
    """Without dropout: what a process draws is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)


class Part(torch.utils.data.Sampler[int]):
    """This process's rows, so that the processes' batches together are one process's."""

    def __iter__(self) -> Iterator[int]:
        rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
        return iter(order[rank::count].tolist())

    def __len__(self) -> int:
        return ROWS // (dist.get_world_size() if dist.is_initialized() else 1)


class Vectors(L.Callback):
    """Saves which rows' vectors a process has, and how many bytes they take."""

    def __init__(self, folder: Path, influence: InfluenceCallback) -> None:
        self.folder, self.influence = folder, influence

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        recorder = self.influence._recorder
        if trainer.global_step == 9 and recorder is not None and recorder.store is not None:
            vectors = recorder.store.vectors
            held = vectors._sums[:-1].abs().sum(1).count_nonzero(), len(vectors._sums)
            torch.save(held, self.folder / f"rows-{trainer.global_rank}.pt")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report = self.influence.report
        assert report is not None
        torch.save(pl_module.state_dict(), self.folder / "last.pt")
        torch.save((report.store, report.run.notes), self.folder / f"report-{trainer.global_rank}.pt")


def fit(folder: Path, devices: int, store: GradientStore = WHOLE, **options: Any) -> InfluenceReport:
    """Trains on the same rows a step, however many processes take their parts of them."""
    folder.mkdir()
    L.seed_everything(3, verbose=False)
    data, held_out = (TensorDataset(torch.randn(n, 5), torch.randint(3, (n,))) for n in (ROWS, 16))
    influence = InfluenceCallback(
        "val", refresh_every=4, curvature_every=1, reservoir=0, store=store, dirpath=folder, on_error="warn", **options
    )
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    strategy = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if devices == 2 else {}
    trainer = L.Trainer(
        max_epochs=3, callbacks=[influence, Vectors(folder, influence)], enable_model_summary=False, **quiet, **strategy
    )
    trainer.fit(Classifier(), DataLoader(data, BATCH // devices, sampler=Part()), DataLoader(held_out, 16))
    return InfluenceReport.load(folder)


def asked(report: InfluenceReport, folder: Path) -> np.ndarray:
    """Scores of four queries that nobody knew of."""
    module = Classifier()
    module.load_state_dict(torch.load(folder / "last.pt"))
    g = torch.Generator().manual_seed(0)
    batches = {str(k): (torch.randn(6, 5, generator=g), torch.randint(3, (6,), generator=g)) for k in range(4)}
    return report.ask(batches, module).scores


@pytest.mark.parametrize(("closing", "limit"), [(False, 1e-3), pytest.param(True, 0.05, marks=pytest.mark.long)])
def test_two_processes_have_the_store_of_one(tmp_path: Path, closing: bool, limit: float) -> None:
    """But for the components' rounding, and the closing pass, whose weights are chosen by the summed loss: of that each
    process has a part."""
    scores = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        report = fit(folder, devices, methods=[FINE(closing=closing)])
        assert report.store is not None, report.run.notes
        assert report.store.calibration.queries == closing and report.store.seen.all()
        scores.append(asked(report, folder))
    np.testing.assert_allclose(scores[1], scores[0], atol=limit * np.abs(scores[0]).max())
    folder = tmp_path / "2"
    for rank in range(2):  # no process has all rows' vectors
        filled, held = torch.load(folder / f"rows-{rank}.pt")
        assert filled == ROWS // 2 and held == ROWS // 2 + 1
    (one, _), (other, _) = (torch.load(folder / f"report-{rank}.pt", weights_only=False) for rank in range(2))
    np.testing.assert_array_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.components, other.components)


LATER = [pytest.param(one, marks=pytest.mark.long) for one in ((RowVectors, "vectors"), (reduce.Combined, "weighted"))]


@pytest.mark.parametrize("place", [(StoreRecording, "prepare"), *LATER])
def test_what_fails_in_one_process_costs_the_store_alone(tmp_path: Path, place: tuple[type, str]) -> None:
    with accident(*place, 0, lambda: dist.is_initialized() and dist.get_rank() == 1):
        report = fit(tmp_path / "2", 2)
    assert report.store is None and np.isfinite(report.scores.mu).all()
    for rank in range(2):
        store, notes = torch.load(tmp_path / "2" / f"report-{rank}.pt", weights_only=False)
        assert store is None and any("no gradient store" in note for note in notes)


def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def plain(seed: int = 0) -> tuple[nn.Sequential, tuple[Tensor, Tensor], list[Tensor]]:
    """A network, rows, and the rows of each step."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    data = torch.randn(ROWS, 5), torch.randint(3, (ROWS,))
    return module, data, [part for _ in range(3) for part in torch.randperm(ROWS).split(BATCH)]


def loop(parts: int = 1, rank: int = 0, settings: GradientStore = WHOLE) -> tuple[Any, list[Tensor], list[str]]:
    """A plain loop, split by FSDP2 with several parts; the store, the weights and notes."""
    module, (x, y), order = plain()
    if parts > 1:
        mesh = init_device_mesh("cpu", (parts,))
        for layer in (module[0], module[2], module):
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)
    options: dict[str, Any] = {"total_steps": len(order), "refresh_every": 4, "curvature_every": 1, "reservoir": 0}
    recorder = Recorder(
        module, optimizer, ROWS, {"val": (x[:9], y[:9])}, loss_of, [FINE(closing=False)], distributed=parts > 1,
        store=settings, on_error="raise", **options,
    )  # fmt: skip
    with recorder:
        for batch in order:
            rows = batch[rank::parts]
            with recorder.batch(rows, (x[rows], y[rows])):
                loss = loss_of(module, (x[rows], y[rows]))
                recorder.see(loss)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    report = recorder.report()
    return report.store, [p.detach().clone() for p in weights], report.run.notes


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save((loop(2, rank), loop(2, rank, BANDS)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_parameters_split_by_fsdp2_give_the_store_of_one_process() -> None:
    alone, weights, _ = loop()
    module, (x, y), _ = plain()
    report, scores = example_report(ROWS), []
    for store, last, notes in (*(each for each, _ in spawned("store of FSDP2", process)), (alone, weights, [])):
        assert store is not None, notes
        for p, value in zip(module.parameters(), last, strict=True):
            p.data.copy_(value)
        asked_of = InfluenceReport(report.scores, report.run, store=store)
        scores.append(
            asked_of.ask({"one": (x[20:24] + 0.1, y[20:24]), "two": (x[:2], y[:2])}, module, loss=loss_of).scores
        )
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-4 * np.abs(scores[2]).max())


def test_vectors_are_the_same_in_the_host_s_memory_when_there_is_no_room(tmp_path: Path) -> None:
    few = GradientStore(bytes_per_row=4 + 4 * 512, dtype="float32", device_bytes=0)
    one, other = fit(tmp_path / "one", 1), fit(tmp_path / "other", 1, few)
    assert one.store is not None and other.store is not None
    np.testing.assert_array_equal(one.store.rows, other.store.rows)


@pytest.mark.long
def test_numbers_of_mixed_width_are_gathered_with_the_same_bands_in_each_process() -> None:
    alone, (one, other) = loop(settings=BANDS)[0], (each[0] for _, each in spawned("store of FSDP2", process))
    assert one.bands == other.bands == alone.bands and len(one.bands) > 1
    for name in ("rows", "scale", "components"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    found, expected = one.unit_rows() @ one.unit_rows().T, alone.unit_rows() @ alone.unit_rows().T
    assert one.seen.all() and np.abs(found - expected).max() < 0.05
