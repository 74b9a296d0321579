"""EK-FAC scores of one network by this package, kronfluence, dattri and pyDVL: the same numbers, and their cost.

The network of the halves, the rows' own labels (empirical Fisher), damping 1e-3; queries are losses of held-out rows.
dattri's two faults are mended as :mod:`benchmarks.lds.peers` says. Each library is called several times, in turn, so
that all meet the same load. The network is tiny, where seconds are what a call costs; 1,500 digits and wider hidden
layers, untrained, tell how a library grows. pyDVL has
another Fisher: its rows are gradients of ``sum_c sqrt(p_c) log p_c``, classes added up before they are squared, so its
numbers are not to be equal.
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
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.influence.halves import SPREAD, Problem, problem
from benchmarks.influence.products import trained
from benchmarks.influence.shared import context_of, network, scored, shuffled_digits
from benchmarks.lds.peers import without_biases
from benchmarks.metrics import Floats
from benchmarks.network import RowLosses, cross_entropy
from ine_callback import IF

DAMPING, TOGETHER, WIDTHS = 1e-3, 128, (256, 1024)
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


def pydvl(model: nn.Module, p: Problem) -> Floats:
    """Those of pyDVL, with a Fisher of its own; its score is N times ours."""
    from pydvl.influence.torch import EkfacInfluence

    method = EkfacInfluence(model, update_diagonal=True, hessian_regularization=DAMPING)
    method.fit(DataLoader(TensorDataset(p.x, p.y), TOGETHER))
    found = method.influences(p.xq, p.yq, p.x, p.y)
    scores: Floats = found.detach().double().numpy().T / len(p.y)
    return scores


PEERS: dict[str, Library] = {"kronfluence": kronfluence, "dattri": dattri, "pydvl": pydvl}


def measured(quick: bool) -> dict[str, Any]:
    """Agreement with ours and seconds, for every library that is installed, and seconds of wider networks."""
    p, calls = problem(quick), 2 if quick else 6
    model = trained(p, 0).module
    installed = {name: library for name, library in PEERS.items() if importlib.util.find_spec(name)}
    seconds, scores = _called(installed, model, p, calls)
    found: dict[str, Any] = {}
    for name in seconds:
        a, b = scores[name], scores["ine_callback"]
        found[name] = {
            "spearman": float(np.mean([spearmanr(x, y).statistic for x, y in zip(a.T, b.T, strict=True)])),
            "scale": float((a * b).sum() / (b * b).sum()),
            "error": float(np.linalg.norm(a * (a * b).sum() / (a * a).sum() - b) / np.linalg.norm(b)),
            "seconds": _spread(seconds[name]),
            "times ours": _spread(np.divide(seconds[name], seconds["ine_callback"])),
        }
    wider: dict[str, Any] = {}
    for width in WIDTHS[:1] if quick else WIDTHS:
        wide = _wide(width)
        seconds, _ = _called(installed, network(width, 0, SPREAD).float(), wide, 3)
        wider[str(width)] = {name: _spread(each) for name, each in seconds.items()}
    missing = sorted(set(PEERS) - set(installed))
    return {"missing": missing, "calls": calls, "damping": DAMPING, "libraries": found, "wider": wider}


def _called(
    installed: dict[str, Library], model: nn.Module, p: Problem, calls: int
) -> tuple[dict[str, list[float]], dict[str, Floats]]:
    """CPU seconds of all calls but the first, which imports, and scores."""
    seconds: dict[str, list[float]] = {}
    scores: dict[str, Floats] = {}
    for _ in track(range(calls), description="libraries"):
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
    return {name: each[1:] for name, each in seconds.items()}, scores


def _wide(width: int) -> Problem:
    """All digits, 40 of them as queries, for a network of this width."""
    x, y = shuffled_digits(0)
    x = x.float()
    return Problem(x[:1500], y[:1500], x[1500:1540], y[1500:1540], width, 0, 0, 0)


def _spread(values: Any) -> list[float]:
    """Median, least and most."""
    return [float(np.median(values)), float(np.min(values)), float(np.max(values))]
