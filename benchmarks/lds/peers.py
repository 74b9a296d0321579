"""The other libraries' methods, as their own examples call them: dattri (TracIn, influence functions, TRAK), traker.

Every function takes the stacked parameters of the trained networks [models, ...] and returns scores [2, N, Q]: what a
row does for the queries' losses and for their margins, positive where it helps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.lds.problems import Problem, row_losses, row_margins
from benchmarks.lds.retrain import Stacked
from benchmarks.metrics import Floats

DAMPING = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
Parameters = dict[str, Tensor]
Batch = tuple[Tensor, ...]
Function = Callable[[Parameters, Batch], Tensor]


class Functions:
    """The functions of parameters and a batch that dattri asks for, in torch.func style."""

    def __init__(self, problem: Problem) -> None:
        self.model = problem.network().eval()

    def logits(self, parameters: Parameters, x: Tensor) -> Tensor:
        out: Tensor = functional_call(self.model, parameters, (x,))
        return out

    def loss(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Mean loss."""
        return row_losses(self.logits(parameters, batch[0]), batch[1]).mean()

    def margin(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Mean margin: what TRAK linearises."""
        return row_margins(self.logits(parameters, batch[0]), batch[1]).mean()

    def query(self, parameters: Parameters, batch: Batch) -> Tensor:
        """The loss, or the negated margin where a third element of the batch is 1; EK-FAC asks without one."""
        loss = self.loss(parameters, batch)
        return loss if len(batch) < 3 else torch.where(batch[2] > 0, -self.margin(parameters, batch), loss).mean()

    def raised(self, parameters: Parameters, batch: Batch) -> Tensor:
        """The negated query: TRAK's scores are positive where a row raises what is asked."""
        return -self.query(parameters, batch)

    def probability(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Probability of the true class (of a text: the geometric mean over its characters).

        TRAK weighs a row by 1 - p, minus the derivative of its loss by its margin; for squared errors that is no
        probability.
        """
        if batch[1].is_floating_point():
            return 1 + 2 * (self.margin(parameters, batch) - batch[1].mean())
        return torch.exp(-self.loss(parameters, batch))


def of_row(function: Function) -> Function:
    """The function for one row without a batch dimension, as TracIn and TRAK call it."""
    return lambda parameters, row: function(parameters, tuple(part[None] for part in row))


def rows(problem: Problem, batch: int) -> DataLoader[Any]:
    """The training rows in their order."""
    return DataLoader(TensorDataset(problem.x, problem.y), batch)


def queries(problem: Problem, batch: int) -> DataLoader[Any]:
    """Every query twice: asked for its loss, then for its margin."""
    kind = torch.arange(2.0).repeat_interleave(len(problem.xq))
    return DataLoader(
        TensorDataset(problem.xq.repeat(2, 1), problem.yq.repeat(2, *[1] * (problem.yq.dim() - 1)), kind), batch
    )


def chunk(problem: Problem) -> int:
    """Rows whose gradients are held at once: a gigabyte of them."""
    return min(len(problem.x), 250_000_000 // sum(p.numel() for p in problem.network().parameters()))


def states(stacked: Stacked, models: int) -> list[Stacked]:
    """The state dictionaries of the first ``models`` networks."""
    return [{k: v[m].clone() for k, v in stacked.items()} for m in range(models)]


def by_kind(problem: Problem, scores: Tensor) -> Floats:
    """[2, N, Q] from dattri's [N, 2 Q]."""
    found: Floats = scores.detach().double().numpy().reshape(len(problem.x), 2, -1).transpose(1, 0, 2)
    return found


def tracin(problem: Problem, trajectory: Stacked) -> Floats:
    """TracIn over the checkpoints of one training [checkpoints, ...], without projection."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    f, checkpoints, size = Functions(problem), states(trajectory, count(trajectory)), chunk(problem)
    task = AttributionTask(of_row(f.loss), f.model, checkpoints, target_func=of_row(f.query))
    weights = torch.full((len(checkpoints),), problem.lr)
    attributor = TracInAttributor(task, weights, normalized_grad=False, projector_kwargs={"proj_type": "identity"})
    return by_kind(problem, attributor.attribute(rows(problem, size), queries(problem, 2 * len(problem.xq))))


def influence_cg(problem: Problem, stacked: Stacked, damping: float) -> Floats:
    """Influence functions, the Hessian inverted by ten conjugate-gradient steps on ``problem.hessian_rows`` rows."""
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask

    f, everything = Functions(problem), rows(problem, len(problem.x))
    some = DataLoader(
        TensorDataset(problem.x[: problem.hessian_rows], problem.y[: problem.hessian_rows]), len(problem.x)
    )
    task = AttributionTask(f.loss, f.model, states(stacked, 1), target_func=f.query)
    attributor = IFAttributorCG(task, max_iter=10, regularization=damping)
    attributor.cache(some)
    # One batch of rows: dattri inverts the Hessian anew for every batch of them.
    return by_kind(problem, attributor.attribute(everything, queries(problem, 10)))


def influence_ekfac(problem: Problem, stacked: Stacked, damping: float) -> Floats:
    """Influence functions, the Fisher matrix of the linear layers by EK-FAC.

    Two faults of dattri 0.3.0 are mended here, so that the method is judged and not they: it tears a layer's weight
    from its bias when it inverts (biases are passed as weights of an input of 1), and takes the rows of the matrices of
    eigenvectors for the eigenvectors, which are the columns.
    """
    from dattri.algorithm.influence_function import IFAttributorEKFAC
    from dattri.func.fisher import estimate_eigenvector
    from dattri.task import AttributionTask

    f = Functions(problem)
    f.model.load_state_dict(states(stacked, 1)[0])
    f.model = without_biases(f.model)
    task = AttributionTask(f.loss, f.model, [f.model.state_dict()], target_func=f.query)
    attributor = IFAttributorEKFAC(task, damping=damping)

    def eigenvectors(covariances: Any) -> Any:
        return {name: (a.mT, g.mT) for name, (a, g) in estimate_eigenvector(covariances).items()}

    with mock.patch("dattri.func.fisher.estimate_eigenvector", eigenvectors):
        attributor.cache(rows(problem, 64))
    return by_kind(problem, attributor.attribute(rows(problem, chunk(problem)), queries(problem, 2 * len(problem.xq))))


class BiasAsWeight(nn.Module):
    """A linear layer whose bias is the weight of an input that is always 1."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.linear = nn.Linear(layer.in_features + 1, layer.out_features, bias=False)
        self.linear.weight = nn.Parameter(torch.cat([layer.weight, layer.bias[:, None]], 1).detach())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.cat([x, torch.ones_like(x[..., :1])], -1))
        return out


def without_biases(layers: nn.Module) -> nn.Module:
    """The same sequence of layers, linear ones with their bias as weight.

    Raises:
        NotImplementedError: If it is no sequence of linear layers and layers without parameters.
    """
    if any(not isinstance(layer, nn.Linear) and list(layer.parameters()) for layer in layers.children()):
        raise NotImplementedError("dattri's EK-FAC knows linear layers on rows without positions alone")
    return nn.Sequential(*(BiasAsWeight(m) if isinstance(m, nn.Linear) else m for m in layers.children())).eval()


def trak(problem: Problem, stacked: Stacked, models: int, dimensions: int) -> Floats:
    """TRAK on so many models, projected to so many dimensions (dattri's default: 512)."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    f, size = Functions(problem), chunk(problem)
    task = AttributionTask(of_row(f.margin), f.model, states(stacked, models), target_func=of_row(f.raised))
    attributor = TRAKAttributor(task, of_row(f.probability), projector_kwargs={"proj_dim": dimensions})
    attributor.cache(rows(problem, size))
    return by_kind(problem, attributor.attribute(queries(problem, 2 * len(problem.xq))))


def traker(problem: Problem, stacked: Stacked, models: int, dimensions: int = 512) -> Floats:
    """The TRAK authors' own library, for classification; it asks for margins, which here also answer for losses."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    model = problem.network().eval()
    size = sum(p.numel() for p in model.parameters())
    projector = BasicProjector(size, dimensions, 0, ProjectionType.rademacher, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        tracer = TRAKer(
            *(model, "image_classification", len(problem.x), folder),
            device="cpu",
            projector=projector,
            proj_dim=dimensions,
            use_half_precision=False,
        )
        for number, state in enumerate(states(stacked, models)):
            tracer.load_checkpoint(state, model_id=number)
            for batch in rows(problem, chunk(problem)):
                tracer.featurize(batch, num_samples=len(batch[0]))
        tracer.finalize_features()
        for number, state in enumerate(states(stacked, models)):
            tracer.start_scoring_checkpoint("queries", state, number, len(problem.xq))
            tracer.score((problem.xq, problem.yq), num_samples=len(problem.xq))
        scores = tracer.finalize_scores("queries")
    found = np.asarray(scores, dtype=np.float64)
    return np.stack([found, found])


def count(stacked: Stacked) -> int:
    """How many networks are stacked."""
    return len(next(iter(stacked.values())))
