"""Whole Trainer runs with the callback and without it: rows and tokens a second, as a user sees them.

    python -m benchmarks.overhead.trainer --json trainer.json                 # CPU, one thread
    python -m benchmarks.overhead.trainer --device cuda --json trainer.json   # bf16-mixed and bf16-true
    python -m benchmarks.overhead.trainer --batches 1 8 64 --json trainer.json

Each run is ``Trainer.fit`` over a DataLoader with workers, first without and then with ``InfluenceCallback`` on one
query and self-influence, twice in turn; the faster of the two counts. Refreshes and curvature updates are inside, the
first ``--warm-up`` steps and the closing pass are not: the latter is given in seconds.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.data import folder
from benchmarks.network import machine
from benchmarks.overhead import workloads
from benchmarks.overhead.workloads import Batch, Workload, loss_of
from ine_callback import InfluenceCallback

STEPS, WARM_UP, REPEATS, WORKERS = 300, 21, 2, 2


class Module(L.LightningModule):
    """A workload's network, its loss and AdamW, fused on a GPU."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model: nn.Module = workload.network()
        self.lr = workload.lr

    def training_step(self, batch: Batch) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=torch.cuda.is_available())


class Stopwatch(L.Callback):
    """Seconds from the end of the warm-up to the last step, and from there to the end of the fit."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.began, self.trained = warm_up, 0.0, 0.0

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.warm_up:
            self.began = self.now()
        elif trainer.global_step == trainer.max_steps:
            self.trained = self.now()


def fitted(workload: Workload, batch: int, device: str, precision: str, steps: int, warm_up: int, ours: bool) -> Any:
    """Seconds of the steps after the warm-up, seconds of the fit's end, and peak bytes of GPU memory."""
    watch, callbacks = Stopwatch(warm_up), []
    if ours:
        queries = {"val": workload.query, "self": "self"}
        callbacks = [InfluenceCallback(queries, on_error="raise")]
    rows = DataLoader(
        TensorDataset(workload.x, workload.y), batch, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder_of_report:
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            max_steps=steps,
            callbacks=[*callbacks, watch],
            default_root_dir=folder_of_report,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(workload), rows)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return watch.trained - watch.began, watch.now() - watch.trained, peak


def measured(workload: Workload, batch: int, device: str, precision: str, steps: int, warm_up: int) -> dict[str, Any]:
    """One line of the table: both runs, the faster of each in turn."""
    runs: dict[bool, list[Any]] = {False: [], True: []}
    for turn in track(range(2 * REPEATS), description=f"{workload.name}, batches of {batch}, {precision}"):
        ours = bool(turn % 2)
        runs[ours].append(fitted(workload, batch, device, precision, steps, warm_up, ours))
    plain, ours_ = (min(runs[ours]) for ours in (False, True))
    rows = (steps - warm_up) * batch
    tokens = workload.y[0].numel()
    return {
        "workload": workload.name,
        "what": workload.what,
        "batch": batch,
        "precision": precision,
        "tokens_a_row": tokens,
        "plain_a_second": rows * tokens / plain[0],
        "ours_a_second": rows * tokens / ours_[0],
        "fraction": plain[0] / ours_[0],
        "end_s": ours_[1] - plain[1],
        "peak_memory_ratio": ours_[2] / plain[2] if plain[2] else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = workloads.parser(__doc__)
    parser.add_argument("--batches", nargs="+", type=int, help="rows in a batch; the workload's own by default")
    parser.add_argument("--precisions", nargs="+", help="by default bf16-mixed and bf16-true on a GPU, else 32-true")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps that are not timed")
    parser.add_argument("--quick", action="store_true", help="a few steps of the MLP: to see it work")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    steps, warm_up = (8, 3) if args.quick else (args.steps, args.warm_up)
    names = ["mlp"] if args.quick else args.workloads or (("gpt2", "resnet18") if cuda else workloads.CPU)
    results: dict[str, Any] = {
        "protocol": "trainer",
        "machine": machine(),
        "device": torch.cuda.get_device_name() if cuda else "CPU, one thread",
        "steps": steps - warm_up,
        "runs": [],
    }
    for name in names:
        if lacks := workloads.missing(name):
            print(f"{name} is left out: {lacks} is not installed")
            continue
        workload = workloads.load(name, folder(args.data))
        for batch in args.batches or [workload.batch]:
            for precision in args.precisions or (["bf16-mixed", "bf16-true"] if cuda else ["32-true"]):
                found = measured(workload, batch, args.device, precision, steps, warm_up)
                results["runs"].append(found)
                args.json.write_text(json.dumps(results, indent=1))
                print(f"{found['what']}, batches of {batch}, {precision}: {found['fraction']:.3f} of the plain speed")


if __name__ == "__main__":
    main()
