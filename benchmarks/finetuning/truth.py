"""The truth: fine-tunings on random halves of the documents, each half several times, and on all of them."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks.finetuning.model import FineTuning, Training, Weights, document_losses, pretrain
from benchmarks.finetuning.text import Task
from benchmarks.metrics import Floats, per_query

SEED = 1000  # of the retrainings; recorded runs have seeds below


@dataclass(frozen=True)
class Counts:
    """Random halves, fine-tunings of each, and fine-tunings on all documents."""

    halves: int = 60
    seeds: int = 3
    all_rows: int = 12


@dataclass(frozen=True)
class Truth:
    """What the retrainings found.

    Attributes:
        losses: Of the queries, by half [seeds, halves, Q].
        all_rows: Of the queries, after training on all documents [runs, Q].
        masks: The documents of each half [halves, N].
        seconds: CPU seconds that the retrainings took.
    """

    losses: Floats
    all_rows: Floats
    masks: Floats
    seconds: float

    @property
    def outcome(self) -> Floats:
        """What scores are to foretell [halves, Q]: minus the mean loss, less its mean over the halves."""
        mean = self.losses.mean(0)
        found: Floats = mean.mean(0) - mean
        return found

    @property
    def sd(self) -> Floats:
        """Standard deviation of each query's loss over trainings on all documents [Q]."""
        found: Floats = self.all_rows.std(0, ddof=1)
        return found

    def reliability(self) -> dict[str, float]:
        """How well the halves' ranking is known: reliability of the mean over seeds, and the most an LDS can be.

        By the correlation of single seeds, extrapolated to all of them (Spearman and Brown).
        """
        seeds = len(self.losses)
        if seeds < 2:
            return {}
        pairs = [per_query(a, b) for a, b in itertools.combinations(self.losses, 2)]
        single = np.mean(pairs, 0)
        whole = seeds * single / (1 + (seeds - 1) * single)
        return {
            "single": float(single.mean()),
            "reliability": float(whole.mean()),
            "ceiling": float(np.sqrt(whole.clip(0)).mean()),
        }


def halves(rows: int, count: int) -> Tensor:
    """Documents [count, rows / 2] of independent random halves."""
    g = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(rows, generator=g)[: rows // 2].sort().values for _ in range(count)])


class Kept:
    """The pre-trained weights and the truth, computed where the file does not have them.

    Args:
        task: Documents.
        training: How to train.
        counts: How many fine-tunings.
        file: Where they are kept; None: nowhere.

    Raises:
        SystemExit: If the file is of other documents or another training.
    """

    def __init__(self, task: Task, training: Training, counts: Counts, file: Path | None) -> None:
        self._task, self._training, self._counts, self._file = task, training, counts, file
        facts = {"training": asdict(training), "counts": asdict(counts), "documents": task.fingerprint}
        self._state: dict[str, Any] = {"facts": facts}
        if file is not None and file.is_file():
            self._state = torch.load(file)
            if self._state["facts"] != facts:
                raise SystemExit(f"{file} holds another truth ({self._state['facts']}); name another file with --truth")

    @property
    def weights(self) -> Weights:
        """The weights from which every fine-tuning starts."""
        if "weights" not in self._state:
            self._state["weights"] = pretrain(self._task, self._training)
            self._save()
        weights: Weights = self._state["weights"]
        return weights

    def finetuning(self, seed: int, dropout: float, rows: Tensor | None = None) -> FineTuning:
        """A fine-tuning, by default on all documents."""
        everything = torch.arange(len(self._task.x))
        chosen = everything if rows is None else rows
        return FineTuning(self._task, self._training, self.weights, chosen, seed, dropout)

    def truth(self, dropout: float) -> Truth:
        """The truth with one probability of dropout."""
        counts, task = self._counts, self._task
        rows = halves(len(task.x), counts.halves)
        found = self._state.setdefault(f"dropout {dropout:g}", {"losses": [], "seconds": 0.0})
        jobs: list[tuple[int, Tensor | None]] = [
            (SEED * (seed + 1) + k, half) for seed in range(counts.seeds) for k, half in enumerate(rows)
        ]
        jobs += [(SEED * (counts.seeds + 1) + k, None) for k in range(counts.all_rows)]
        missing = jobs[len(found["losses"]) :]
        for k, (seed, half) in enumerate(track(missing, description=f"truth, dropout {dropout:g}")):
            started = time.process_time()
            model = self.finetuning(seed, dropout, half).run()
            found["losses"].append(document_losses(model, task.xq, task.yq))
            found["seconds"] += time.process_time() - started
            if k % 20 == 19 or k + 1 == len(missing):
                self._save()
        losses = torch.stack(found["losses"]).double().numpy()
        of_halves = losses[: -counts.all_rows].reshape(counts.seeds, counts.halves, -1)
        masks = np.zeros((counts.halves, len(task.x)))
        np.put_along_axis(masks, rows.numpy(), 1.0, 1)
        return Truth(of_halves, losses[-counts.all_rows :], masks, found["seconds"])

    def _save(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self._state, self._file)
