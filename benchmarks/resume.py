"""Kills trainings at random moments (SIGKILL) and resumes them: does an observation get lost?

    python -m benchmarks.resume --trials 200 --json resume.json [--seed 0]

A child process trains a small network (40 rows, 5 batches an epoch, 6 epochs; checkpoints every second step, most of
them inside of an epoch; a loader that goes on where it was) and is killed at a random moment, also while it saves; the
next one goes on from the last checkpoint, and is killed with probability one half. A journal of the batches, kept by
another callback, says what was trained on: visits that the report lacks or has too many are lost. Where the batches
were those of a training that nobody killed, all arrays of the report and its store, and the weights, are compared bit
by bit. They are
others where Lightning 2.6 itself repeats batches: after a resume from a checkpoint of an epoch's last batch, a second
one starts its epoch again.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.network import machine
from ine_callback import GradientStore, InfluenceCallback

ROWS, BATCH, EPOCHS, EVERY = 40, 8, 6, 2
Result = dict[str, Any]


class Remembers(DataLoader[Any]):
    """A loader that goes on where it was, by the protocol that Lightning looks for."""

    done = skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                self.done = number + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["done"]


class Journal(L.Callback):
    """Notes each step's rows in a file that outlives the process; what a resumed training redoes is struck out."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        kept = [line for line in self.lines() if line[0] < trainer.global_step]
        part = self.file.with_suffix(".part")  # the kill may come in between
        part.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        part.rename(self.file)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int) -> None:
        with self.file.open("a") as file:
            file.write(f"{json.dumps([trainer.global_step, batch[2].tolist()])}\n")

    def lines(self) -> list[list[Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("]]")]


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def train(folder: Path) -> None:
    """Trains, or goes on from ``folder``'s last checkpoint, and leaves result.pickle there."""
    L.seed_everything(3, verbose=False)
    rows, held_out = (TensorDataset(torch.randn(n, 5), torch.randint(3, (n,)), torch.arange(n)) for n in (ROWS, 16))
    store = GradientStore(bytes_per_row=64)
    influence = InfluenceCallback(["val", "self"], refresh_every=3, curvature_every=1, store=store, on_error="raise")
    journal = Journal(folder / "journal")
    keep = ModelCheckpoint(folder, every_n_train_steps=EVERY, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        callbacks=[influence, keep, journal],
    )
    loader = Remembers(rows, BATCH, sampler=DistributedSampler(rows, 1, 0, seed=5))
    last = folder / "last.ckpt"
    module = Classifier()
    trainer.fit(module, loader, DataLoader(held_out, 16), ckpt_path=last if last.exists() else None)
    report = influence.report
    assert report is not None and report.store is not None
    arrays = {name: value for name, value in vars(report.scores).items() if isinstance(value, np.ndarray)}
    arrays |= {f"store {name}": value for name, value in vars(report.store).items() if isinstance(value, np.ndarray)}
    weights = [p.detach().numpy() for p in module.parameters()]
    found = {"steps": report.run.steps, "arrays": arrays, "weights": weights, "notes": report.run.notes}
    found["journal"] = journal.lines()
    part = folder / "part.pickle"
    part.write_bytes(pickle.dumps(found))
    part.rename(folder / "result.pickle")


def attempt(folder: Path, after: float | None) -> None:
    """One child process; killed ``after`` so many seconds unless it is done by then."""
    child = multiprocessing.get_context("fork").Process(target=train, args=(folder,))
    child.start()
    child.join(after)
    if child.is_alive() and child.pid is not None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()


def trial(seconds: float, chance: random.Random) -> tuple[Result, int]:
    """A training that is killed at least once; with the number of kills."""
    with tempfile.TemporaryDirectory() as name:
        folder, kills = Path(name), 0
        while not (folder / "result.pickle").exists():
            killed = kills == 0 or chance.random() < 0.5
            attempt(folder, chance.uniform(0.1, 1.0) * seconds if killed else None)
            kills += killed
            if not killed and not (folder / "result.pickle").exists():
                raise SystemExit("a training that nobody killed did not end")
        found: Result = pickle.loads((folder / "result.pickle").read_bytes())
        return found, kills


def faults(found: Result, whole: Result) -> list[str]:
    """In what a resumed training differs from the whole one."""
    arrays, expected = found["arrays"], whole["arrays"]
    out = [n for n, value in expected.items() if not np.array_equal(arrays[n], value, equal_nan=True)]
    out += ["steps"] if found["steps"] != whole["steps"] else []
    same = all(np.array_equal(a, b) for a, b in zip(found["weights"], whole["weights"], strict=True))
    return out + ([] if same else ["weights"])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--trials", type=int, default=200, help="trainings that are killed and resumed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        started = time.monotonic()
        attempt(Path(name), None)
        seconds = time.monotonic() - started
        whole: Result = pickle.loads((Path(name) / "result.pickle").read_bytes())
    lost, differing, kills, resumed, compared = 0, Counter[str](), 0, 0, 0
    for _ in track(range(args.trials), description="trials"):
        found, killed = trial(seconds, chance)
        kills += killed
        resumed += any(note.startswith("resumed at step") for note in found["notes"])
        visits = np.bincount([row for _, rows in found["journal"] for row in rows], minlength=ROWS)
        lost += int(np.abs(found["arrays"]["observations"] - visits).sum())
        if found["journal"] == whole["journal"]:
            compared += 1
            differing.update(faults(found, whole))
    results = {
        "protocol": "resume",
        "machine": machine(),
        "rows": [
            {
                "trials": args.trials,
                "kills": kills,
                "resumed": resumed,
                "lost": lost,
                "same batches": compared,
                "differing": dict(differing),
            }
        ],
    }
    print(json.dumps(results["rows"], indent=1))
    args.json.write_text(json.dumps(results, indent=1))
    if lost or differing:
        raise SystemExit("observations were lost or scores differ")


if __name__ == "__main__":
    main()
