r"""Products of a trained model's Fisher with vectors, from the rows' captured gradients: no second derivatives.

The Fisher (the generalised Gauss-Newton matrix, for cross entropy and squared errors) of the mean training loss is

    F = 1/N sum_i sum_c f_ic f_ic^T

with gradients f_ic of row i under label c: all labels, each times the root of its probability (``"exact"``), one label
drawn from the prediction (``"sampled"``), or the row's own (``"empirical"``). ``F x`` for all queries at once takes two
contractions with the factors that one backward pass leaves, so attention kernels without a forward mode do no harm.
Gradients of up to ``MAX_BYTES`` are stored as factors; of more, every product makes its passes anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample
from ine_callback.capture.per_sample_gradients import Ragged
from ine_callback.methods.context import TOGETHER, FitContext
from ine_callback.methods.influence.space import ParameterSpace
from ine_callback.methods.passes import Labels, PerSamplePass
from ine_callback.methods.row_gradients import RowGradients

Fisher = Literal["exact", "sampled", "empirical"]
LABELS: dict[Fisher, Labels] = {"exact": "expected", "sampled": "sampled", "empirical": "true"}
MAX_BYTES = 2**30  # of stored factors


def fisher_rows(gradients: RowGradients, rows: int) -> RowGradients:
    """A batch's gradients, times what makes the mean of their outer products over the batch its Fisher."""
    terms = torch.as_tensor(gradients.terms, device=gradients.scale.device, dtype=gradients.scale.dtype)
    return gradients.rescaled((terms * rows).sqrt().expand(rows))


@dataclass
class _Stored:
    """Gradients of equally shaped batches, one after the other."""

    chunks: list[RowGradients]
    merged: RowGradients | None = None

    def all(self) -> RowGradients:
        if self.merged is None:
            self.merged, self.chunks = _concatenated(self.chunks), []
        return self.merged


class FisherRows:
    """The rows f of a Fisher, stored or passed anew.

    Args:
        context: The trained model and its rows.
        fisher: Which labels.

    Attributes:
        stored: Whether the gradients are stored.
    """

    def __init__(self, context: FitContext, fisher: Fisher) -> None:
        self._context, self.labels = context, LABELS[fisher]
        self.stored = True
        self._groups: dict[tuple[object, ...], _Stored] = {}
        self._places: dict[int, list[tuple[tuple[object, ...], int]]] = {}
        self._counts: dict[tuple[object, ...], int] = {}

    @property
    def rows(self) -> int:
        """Number of training rows N."""
        return self._context.rows

    def keep(self, rows: Tensor, gradients: RowGradients) -> None:
        """Stores a batch's gradients, if all rows' fit into memory."""
        if not self.stored:
            return
        if any(isinstance(one, Ragged) for b in gradients for one in gradients.grad_samples(b)):
            self.stored = False  # rows have other numbers of entries: read anew each time
            return
        gradients = _detached(fisher_rows(gradients, len(rows)))
        per_row = sum(_bytes(one) for b in gradients for one in gradients.grad_samples(b)) / len(rows)
        seen = len(self._places)
        draws = max(1.0, sum(map(len, self._places.values())) / seen) if seen else 1.0
        if per_row * draws * self.rows > MAX_BYTES:
            self.stored = False
            self._groups.clear()
            self._places.clear()
            return
        key = tuple((b.name, *_shape(one)) for b in gradients for one in gradients.grad_samples(b))
        self._groups.setdefault(key, _Stored([])).chunks.append(gradients)
        start = self._counts.get(key, 0)
        self._counts[key] = start + len(rows)
        for k, row in enumerate(rows.tolist()):
            self._places.setdefault(row, []).append((key, start + k))

    def batches(self, rows: Tensor | None, draw: int) -> Iterator[tuple[Tensor, RowGradients]]:
        """Rows f: pairs of positions in ``rows`` [b] (dataset indices where ``rows`` is None) and gradients."""
        if self.stored:
            yield from self._from_memory(rows)
            return
        chosen = torch.arange(self.rows) if rows is None else rows
        with self._context.without_progress():
            for start in range(0, len(chosen), TOGETHER):
                part = chosen[start : start + TOGETHER]
                asked = PerSamplePass(self.labels, part.tolist(), draw * self.rows + start)
                for which, gradients in self._context.per_sample(asked):
                    yield torch.arange(start, start + len(which)), fisher_rows(gradients, len(which))

    def _from_memory(self, rows: Tensor | None) -> Iterator[tuple[Tensor, RowGradients]]:
        wanted: dict[tuple[object, ...], tuple[list[int], list[int]]] = {}
        for position, row in enumerate(sorted(self._places) if rows is None else rows.tolist()):
            for key, place in self._places[row]:
                positions, places = wanted.setdefault(key, ([], []))
                positions.append(row if rows is None else position)
                places.append(place)
        for key, (positions, places) in wanted.items():
            yield torch.tensor(positions), _selected(self._groups[key].all(), torch.tensor(places))

    def product(
        self, space: ParameterSpace, x: Tensor, rows: Tensor | None = None, weights: Tensor | None = None, draw: int = 0
    ) -> Tensor:
        """``F x`` [Q, P], by all rows or by some.

        Args:
            space: The parameters.
            x: Vectors [Q, P].
            rows: Dataset indices, repetitions allowed; None: all.
            weights: Weight of each of ``rows`` in the sum; None: their mean.
            draw: Which draw of labels.
        """
        total, directions = torch.zeros_like(x), space.split(x)
        count = self.rows if rows is None else len(rows)
        for which, gradients in self.batches(rows, draw):
            with torch.no_grad():
                inner = gradients.products(directions)
                share = 1 / count if weights is None else weights[which].to(inner)[:, None]
                sums = gradients.weighted_sums(inner * share)
                total += space.join(sums).to(total.dtype)
        return total

    def traces(self) -> Tensor:
        """``sum_c |f_ic|^2`` of every row [N], on the host."""
        found = torch.zeros(self.rows, dtype=torch.float64)
        for which, gradients in self.batches(None, 0):
            found.index_add_(0, which, gradients.squared_norms().double().cpu())
        return found


def _shape(grad_sample: GradSample) -> tuple[object, ...]:
    tensors = [getattr(grad_sample, f.name) for f in fields(grad_sample)]  # type: ignore[arg-type]
    return type(grad_sample).__name__, *(tuple(t.shape[1:]) for t in tensors if isinstance(t, Tensor))


def _bytes(grad_sample: GradSample) -> int:
    values = (getattr(grad_sample, f.name) for f in fields(grad_sample))  # type: ignore[arg-type]
    return sum(v.nbytes for v in values if isinstance(v, Tensor))


def _mapped(grad_sample: GradSample, change: Callable[[str, Tensor], Tensor]) -> GradSample:
    """The same with other tensors, whose first dimension is the rows."""
    values = {f.name: getattr(grad_sample, f.name) for f in fields(grad_sample)}  # type: ignore[arg-type]
    changed = {name: change(name, value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(grad_sample, **changed)  # type: ignore[type-var]


def _of(gradients: RowGradients, change: Callable[[Block, int, str, Tensor], Tensor], scale: Tensor) -> RowGradients:
    found = {
        block: [
            _mapped(one, lambda name, value, block=block, k=k: change(block, k, name, value))  # type: ignore[misc]
            for k, one in enumerate(gradients.grad_samples(block))
        ]
        for block in gradients
    }
    return RowGradients(found, scale, 1.0)


def _detached(gradients: RowGradients) -> RowGradients:
    return _of(gradients, lambda _, __, ___, value: value.detach().clone(), gradients.scale.detach().clone())


def _selected(gradients: RowGradients, places: Tensor) -> RowGradients:
    places = places.to(gradients.scale.device)
    return _of(gradients, lambda _, __, ___, value: value[places], gradients.scale[places])


def _concatenated(chunks: Sequence[RowGradients]) -> RowGradients:
    def join(block: Block, k: int, name: str, _: Tensor) -> Tensor:
        return torch.cat([getattr(chunk.grad_samples(block)[k], name) for chunk in chunks])

    return _of(chunks[0], join, torch.cat([chunk.scale for chunk in chunks]))
