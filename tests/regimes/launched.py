"""Trains with a strategy that starts its own processes, as users' scripts do: ``python -m tests.regimes.launched``.

``ddp FOLDER`` records with both methods and leaves a report; ``tensor_parallel`` tells how it was refused.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from ine_callback import BIF, FINE, InfluenceCallback

from .harness import QUIET
from .regime import Classifier, vectors


class Split(Classifier):
    def configure_model(self) -> None:
        """Lightning wants one."""


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kind, *folder = sys.argv[1:]
    L.seed_everything(1, verbose=False)
    strategy: Any = kind if kind == "ddp" else ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    methods = [FINE(), BIF(chains=4, draws=8, batch_size=6, curvature_rows=12)]
    influence = InfluenceCallback(["val", "self"], methods, dirpath=folder[0] if folder else None)
    options = {**QUIET, "strategy": strategy, "devices": 2, "callbacks": [influence]}
    data, module = vectors(), Split()
    L.Trainer(**options).fit(module, data.train, data.val)
    report = influence.report
    assert report is not None and report.stages("BIF") and report.run.steps == 6, report and report.run.notes
    print("recorded", report.run.steps, report.observations.tolist(), float(report.bif.scores.sum()), flush=True)


if __name__ == "__main__":
    main()
