"""EK-FAC scores of one network by this package, kronfluence and dattri: the same numbers, and their cost.

The network of the halves, the rows' own labels (empirical Fisher), damping 1e-3; queries are losses of held-out rows.
dattri's two faults are mended as :mod:`benchmarks.lds.peers` says. Each library is called several times, in turn, so
that all meet the same load. The network is tiny: seconds are what a call costs, not how a library grows.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.influence.halves import Problem, problem
from benchmarks.influence.products import trained
from benchmarks.influence.shared import context_of, scored
from benchmarks.lds.peers import without_biases
from benchmarks.metrics import Floats
from benchmarks.network import RowLosses, cross_entropy
from ine_callback import IF

DAMPING, TOGETHER = 1e-3, 128
Library = Callable[[nn.Module, Problem], Floats]


def ours(model: nn.Module, p: Problem) -> Floats:
    """Scores [N, Q]."""
    context = context_of(model, cross_entropy, (p.x, p.y), {"row": RowLosses(p.xq, p.yq)})
    return scored(context, IF(fisher="empirical", damping=DAMPING)).scores


def kronfluence(model: nn.Module, p: Problem) -> Floats:
    """The same by kronfluence, whose score is N times ours."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Digits(Task):  # type: ignore[misc]  # kronfluence may be missing
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task, rows, queries = Digits(), TensorDataset(p.x, p.y), TensorDataset(p.xq, p.yq)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("digits", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors(
            "factors",
            rows,
            per_device_batch_size=TOGETHER,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=queries,
            train_dataset=rows,
            per_device_query_batch_size=len(p.yq),
            per_device_train_batch_size=TOGETHER,
            score_args=ScoreArguments(damping_factor=DAMPING),
        )
        found = analyzer.load_pairwise_scores("scores")
    scores: Floats = found["all_modules"].double().numpy().T / len(p.y)
    return scores


def dattri(model: nn.Module, p: Problem) -> Floats:
    """The same by dattri, up to a factor."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC
    from dattri.func.fisher import estimate_eigenvector
    from dattri.task import AttributionTask

    model = without_biases(model)

    def loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (batch[0],)), batch[1])

    def eigenvectors(covariances: Any) -> Any:
        return {name: (a.mT, g.mT) for name, (a, g) in estimate_eigenvector(covariances).items()}

    task = AttributionTask(loss, model, [model.state_dict()], target_func=loss)
    attributor = IFAttributorEKFAC(task, damping=DAMPING)
    rows, queries = TensorDataset(p.x, p.y), TensorDataset(p.xq, p.yq)
    with mock.patch("dattri.func.fisher.estimate_eigenvector", eigenvectors):
        attributor.cache(DataLoader(rows, TOGETHER))
    found = attributor.attribute(DataLoader(rows, TOGETHER), DataLoader(queries, len(p.yq)))
    scores: Floats = found.detach().double().numpy()
    return scores


PEERS: dict[str, Library] = {"kronfluence": kronfluence, "dattri": dattri}


def measured(quick: bool) -> dict[str, Any]:
    """Agreement with ours and seconds, for every library that is installed."""
    p, calls = problem(quick), 2 if quick else 6
    model = trained(p, 0).module
    installed = {name: library for name, library in PEERS.items() if importlib.util.find_spec(name)}
    seconds: dict[str, list[float]] = {}
    scores: dict[str, Floats] = {}
    for _ in range(calls):
        for name, library in ({"ine_callback": ours} | installed).items():
            own = copy.deepcopy(model)
            with (
                contextlib.redirect_stdout(quiet := io.StringIO()),
                contextlib.redirect_stderr(quiet),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                started = time.process_time()
                scores[name] = library(own, p)
            seconds.setdefault(name, []).append(time.process_time() - started)
    found: dict[str, Any] = {}
    for name in seconds:
        a, b = scores[name], scores["ine_callback"]
        ratios = np.divide(seconds[name][1:], seconds["ine_callback"][1:])  # the first call imports
        found[name] = {
            "spearman": float(np.mean([spearmanr(x, y).statistic for x, y in zip(a.T, b.T, strict=True)])),
            "scale": float((a * b).sum() / (b * b).sum()),
            "error": float(np.linalg.norm(a * (a * b).sum() / (a * a).sum() - b) / np.linalg.norm(b)),
            "seconds": [float(np.median(seconds[name][1:])), min(seconds[name][1:]), max(seconds[name][1:])],
            "times ours": [float(np.median(ratios)), float(ratios.min()), float(ratios.max())],
        }
    return {"missing": sorted(set(PEERS) - set(installed)), "calls": calls, "damping": DAMPING, "libraries": found}
