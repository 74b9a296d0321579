"""Other stores of gradients on protocol G2, at 1 KB a row: TRAK by its authors' library and dattri's, and bergson's.

They store what trained networks say of a row: gradients of the last weights, projected at random. As many float32
numbers as fit into 1 KB are kept of one network. A TRAK of ten networks is run three times: with 1 KB of each, with a
tenth of the numbers of each, and with as many as 1 KB would have in int8. bergson's hooks run here as its own collector
calls them; its stored numbers are compared as they are, and by the inverse of their second moments, which its
``Attributor`` does where it is given a Hessian. Our own scores are those of :mod:`benchmarks.store.accuracy`; here our
store is only timed.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.lds import peers as lds
from benchmarks.lds import retrain
from benchmarks.lds.problems import Problem, row_losses
from benchmarks.lds.retrain import Stacked
from benchmarks.metrics import Floats, per_query_spearman
from benchmarks.network import RowLosses
from benchmarks.recorded import recorded_step
from ine_callback import FINE, GradientStore, Recorder

NUMBERS = 256  # float32 in 1 KB
IN_TOTAL = "1 KB in total"
AS_INT8 = "1 KB in total if they were int8"  # nobody rounds them: an upper bound
MODELS = 10
SEED = 7  # of the networks, as in benchmarks.lds
RIDGE = 0.01  # of the mean second moment, where bergson's numbers are weighed by its inverse


@dataclass(frozen=True)
class Asked:
    """Scores [N, Q] of a store.

    Attributes:
        scores: Positive where a row lowers the query's loss.
        bytes_per_row: Of the store.
        storing: CPU seconds of making it, without training.
        asking: CPU seconds of all queries' scores, with their gradients.
    """

    scores: Floats
    bytes_per_row: int
    storing: float
    asking: float


def networks(problem: Problem, models: int, file: Path | None) -> tuple[Stacked, float]:
    """Networks trained on all rows [models, ...] and the CPU seconds of one; kept in ``file`` if given."""
    if file is not None and file.is_file():
        kept = torch.load(file)
        return kept["end"], kept["seconds"] / lds.count(kept["end"])
    started = time.process_time()
    end = retrain.last(retrain.train(problem, torch.arange(len(problem.x)).expand(models, -1), SEED))
    seconds = time.process_time() - started
    if file is not None:
        torch.save({"end": end, "seconds": seconds}, file)
    return end, seconds / models


def stores(problem: Problem, stacked: Stacked) -> Iterator[tuple[str, int, Callable[[], Asked]]]:
    """Name, networks and function of each; those whose library is not installed are left out."""
    several = lds.count(stacked)
    kinds = {f"TRAK-{several}, {IN_TOTAL}": (several, NUMBERS // several), "TRAK-1": (1, NUMBERS)}
    kinds |= {f"TRAK-{several}, {AS_INT8}": (several, 4 * NUMBERS // several), f"TRAK-{several}": (several, NUMBERS)}
    for library, function in (("trak", traker), ("dattri", dattri)):
        if importlib.util.find_spec(library):
            for name, (models, numbers) in kinds.items():
                yield f"{function.__name__} {name}", models, partial(function, problem, stacked, models, numbers)
    if importlib.util.find_spec("bergson"):
        yield "bergson", 1, lambda: bergson(problem, stacked, False)
        yield "bergson, inverse second moments", 1, lambda: bergson(problem, stacked, True)


def ours(problem: Problem) -> tuple[float, float]:
    """CPU seconds of asking our store the problem's queries, and its bytes a row; one epoch is recorded for it."""

    def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return row_losses(module(batch[0]), batch[1]).mean()

    model = problem.network()
    optimizer, settings = problem.optimizer(model.parameters()), GradientStore()
    queries = {"row": RowLosses(problem.xq[:1], problem.yq[:1], loss_of)}
    options: dict[str, Any] = {"total_steps": problem.steps_per_epoch, "methods": [FINE(closing=False)]}
    recorder = Recorder(model, optimizer, len(problem.x), queries, loss_of, store=settings, **options)
    with recorder:
        for rows in torch.randperm(len(problem.x)).split(problem.batch)[: problem.steps_per_epoch]:
            recorded_step(recorder, model, optimizer, loss_of, rows, (problem.x[rows], problem.y[rows]))
    report = recorder.report()
    assert report.store is not None
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    report.store = replace(report.store, weights=(weights,) * 3)  # as many as a run with a closing pass keeps
    watch = Stopwatch()
    report.ask({"row": RowLosses(problem.xq, problem.yq, loss_of)}, model, loss=loss_of)
    return watch.look(), settings.bytes_per_row


class Stopwatch:
    """CPU seconds since the last look."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def look(self) -> float:
        before, self._last = self._last, time.process_time()
        return self._last - before


def beside(problem: Problem, outcome: Floats, file: Path | None, wanted: str = "") -> Iterator[dict[str, Any]]:
    """Rows of the table: LDS of each store's scores, with its bytes and CPU seconds.

    Args:
        problem: Protocol G2.
        outcome: Queries' losses [halves, Q] after training on each half.
        file: Where the trained networks are kept.
        wanted: Part of the names wanted.
    """
    asking, size = ours(problem)
    yield {"name": "ine_callback", "networks": 1, "bytes_per_row": size, "asking": asking}
    stacked, training = networks(problem, MODELS, file)
    for name, models, function in stores(problem, stacked):
        if wanted not in name:
            continue
        try:
            found = function()
        except Exception as failure:  # a library's failure is a result
            yield {"name": name, "networks": models, "failed": f"{type(failure).__name__}: {failure}"}
            continue
        sums = -np.stack([found.scores[subset.numpy()].sum(0) for subset in problem.subsets])
        seconds = {"training": models * training, "storing": found.storing, "asking": found.asking}
        lds_found = per_query_spearman(sums, outcome)
        yield {"name": name, "networks": models, "bytes_per_row": found.bytes_per_row, "lds": lds_found, **seconds}


def traker(problem: Problem, stacked: Stacked, models: int, numbers: int) -> Asked:
    """The TRAK authors' library."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    watch, model = Stopwatch(), problem.network().eval()
    size = sum(p.numel() for p in model.parameters())
    projector = BasicProjector(size, numbers, 0, ProjectionType.rademacher, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        tracer = TRAKer(
            *(model, "image_classification", len(problem.x), folder),
            device="cpu",
            projector=projector,
            proj_dim=numbers,
            use_half_precision=False,
        )
        for number, state in enumerate(lds.states(stacked, models)):
            tracer.load_checkpoint(state, model_id=number)
            for batch in lds.rows(problem, lds.chunk(problem)):
                tracer.featurize(batch, num_samples=len(batch[0]))
        tracer.finalize_features()
        storing = watch.look()
        for number, state in enumerate(lds.states(stacked, models)):
            tracer.start_scoring_checkpoint("queries", state, number, len(problem.xq))
            tracer.score((problem.xq, problem.yq), num_samples=len(problem.xq))
        scores = np.asarray(tracer.finalize_scores("queries"), dtype=np.float64)
    return Asked(scores, 4 * numbers * models, storing, watch.look())


def dattri(problem: Problem, stacked: Stacked, models: int, numbers: int) -> Asked:
    """TRAK by dattri, asked for losses."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    watch, f = Stopwatch(), lds.Functions(problem)
    task = AttributionTask(lds.of_row(f.margin), f.model, lds.states(stacked, models), target_func=lds.of_row(f.raised))
    attributor = TRAKAttributor(task, lds.of_row(f.probability), projector_kwargs={"proj_dim": numbers})
    attributor.cache(lds.rows(problem, lds.chunk(problem)))
    storing = watch.look()
    asked = DataLoader(TensorDataset(problem.xq, problem.yq, torch.zeros(len(problem.xq))), len(problem.xq))
    scores = attributor.attribute(asked).detach().double().numpy()
    return Asked(scores, 4 * numbers * models, storing, watch.look())


class Positions(nn.Module):
    """The network on rows of one position: bergson's hooks expect positions. It also tells its device."""

    device = torch.device("cpu")

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x[:, None])[:, 0]
        return out


def bergson(problem: Problem, stacked: Stacked, weighed: bool) -> Asked:
    """Gradients of each layer between two random projections of the same number of dimensions (its default)."""
    from bergson.collector.gradient_collectors import StreamingGradientCollector
    from bergson.gradients import GradientProcessor

    watch, network = Stopwatch(), problem.network()
    network.load_state_dict(lds.states(stacked, 1)[0])
    model = Positions(network.eval())
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    dimensions = int((NUMBERS / layers) ** 0.5)
    processor = GradientProcessor(projection_dim=dimensions, include_bias=True)
    collector = StreamingGradientCollector(model=model, processor=processor, dtype=torch.float32)

    def stored(x: Tensor, y: Tensor) -> Tensor:
        parts = []
        for xs, ys in zip(x.split(500), y.split(500), strict=True):
            with collector:
                row_losses(model(xs), ys).sum().backward()
            parts.append(torch.cat([one.flatten(1) for one in collector.mod_grads.values()], 1))
            collector.mod_grads.clear()
        return torch.cat(parts).double()

    rows = stored(problem.x, problem.y)
    storing = watch.look()
    queries = stored(problem.xq, problem.yq)
    if weighed:
        moments = rows.T @ rows / len(rows)
        moments.diagonal().add_(RIDGE * moments.diagonal().mean())
        queries = torch.linalg.solve(moments, queries.T).T
    scores: Any = (rows @ queries.T).numpy()
    return Asked(scores, 4 * rows.shape[1], storing, watch.look())
