"""What a method that runs on a trained model may ask for: data, queries, and gradients from isolated passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture import Block, BlockTable, Capture, GradSample
from ine_callback.capture.label_gradients import classes_of, expect, sample
from ine_callback.capture.row_losses import read_loss
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.curvature.kfac import KFAC
from ine_callback.distributed.processes import Processes
from ine_callback.errors import CaptureError
from ine_callback.methods.fit_end import PerSamplePass
from ine_callback.queries import Batch, BoundQuery, gradients
from ine_callback.queries.sources import DataSource
from ine_callback.scores import QueryInfo, Scores, Stage
from ine_callback.utilities.isolation import isolated

TOGETHER = 64  # rows of a pass's batch
Track = Callable[[Sequence[Any], str], Iterable[Any]]


def untracked(steps: Sequence[Any], description: str) -> Iterable[Any]:
    """No progress bar."""
    return steps


class RowGradients:
    """Gradients of b rows' own losses, block by block, as the factors that the passes left; formed on demand.

    Args:
        records: Each block's records; several where a batch used it several times.
        scale: What turns a record into gradients of the rows' own losses.
    """

    def __init__(self, grad_samples: dict[Block, list[GradSample]], scale: Tensor | float) -> None:
        self._grad_samples, self._scale = grad_samples, scale

    def __iter__(self) -> Iterator[Block]:
        return iter(self._grad_samples)

    def grad_samples(self, block: Block) -> list[GradSample]:
        """A block's records: their sum times :attr:`scale` are the rows' gradients."""
        return self._grad_samples[block]

    @property
    def scale(self) -> Tensor | float:
        """What records are multiplied with."""
        return self._scale

    def formed(self, block: Block) -> Tensor:
        """The gradients [b, *layout] of a block."""
        first, *rest = (grad_sample.wide().gradient(slice(None)) for grad_sample in self._grad_samples[block])
        return sum(rest, first) * self._scale

    def products(self, directions: dict[Block, Tensor]) -> Tensor:
        """Inner products [b, Q] with directions, each [Q, *layout]."""
        parts = [
            grad_sample.wide().signals(directions[block])
            for block, grad_samples in self._grad_samples.items()
            if block in directions
            for grad_sample in grad_samples
        ]
        return torch.stack(parts).sum(0) * self._scale

    def squared_norms(self) -> Tensor:
        """Squared norms [b] of the gradients over all blocks."""
        parts = [
            grad_samples[0].wide().squared_norms() * self._scale**2
            if len(grad_samples) == 1
            else self.formed(block).flatten(1).square().sum(1)
            for block, grad_samples in self._grad_samples.items()
        ]
        return torch.stack(parts).sum(0)


@dataclass
class FitContext:
    """A trained model with its data and queries, as :class:`~ine_callback.methods.fit_end.FitEndMethod` gets it.

    Every pass is isolated: module, metrics, buffers, logs and random numbers are afterwards as before.

    Attributes:
        module: The model at its present weights.
        queries: The run's bound queries, without ``"self"``.
        source: The training set by index, and the queries' data.
        loss: Mean training loss of a batch, ``(module, batch) -> scalar``.
        to_device: What the trainer does to a batch.
        precision: The trainer's precision, a context for every pass.
        processes: Those that train together.
        progress: Shows a bar: ``for part in progress(parts, "what")``.
        scores: f-INE's scores, where there are any yet.
        factors: Kronecker factors of the run, where it kept any.
        gradient_sample: Gradients of a sample of rows, where the run kept any.
        layers: Patterns of the modules whose parameters count; None: all.
        at: Finished epochs, or ``"end"``.
        seed: For a method's own random numbers.
        owner: Class named in messages.
    """

    module: nn.Module
    queries: Sequence[BoundQuery]
    source: DataSource
    loss: Callable[[nn.Module, Batch], Tensor]
    to_device: Callable[[Batch], Batch] = lambda batch: batch
    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    processes: Processes | None = None
    progress: Track = untracked
    scores: Scores | None = None
    factors: KFAC | None = None
    gradient_sample: GradientSample | None = None
    layers: Sequence[str] | None = None
    at: Stage = "end"
    seed: int = 0
    owner: str = "FitContext"
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = BlockTable(self.module)

    @property
    def rows(self) -> int:
        """Number of training rows N."""
        return self.source.training_rows

    @property
    def infos(self) -> tuple[QueryInfo, ...]:
        """The queries' names and questions."""
        return tuple(query.info for query in self.queries)

    def batches(self, rows: Sequence[int] | None = None, what: str = "rows") -> Iterator[tuple[Tensor, Batch]]:
        """Training rows in order, by their indices [b] and as batches on the device."""
        chosen = torch.arange(self.rows) if rows is None else torch.as_tensor(list(rows), dtype=torch.int64)
        for part in self.progress(chosen.split(TOGETHER), what):
            yield part, self.to_device(self.source.training(part.tolist()))

    def per_sample(self, what: PerSamplePass | None = None) -> Iterator[tuple[Tensor, RowGradients]]:
        """Every training row's gradient at the present weights: pairs of dataset indices [b] and gradients.

        Args:
            what: Which labels and rows; by default the rows' own, all.

        Raises:
            CaptureError: If no layer's gradients can be told apart by rows.
            InfluenceError: If the loss has no labels to draw.
        """
        what = what or PerSamplePass()
        generator = torch.Generator(next(self.module.parameters()).device).manual_seed(self.seed)
        for rows, batch in self.batches(what.rows, "per-sample gradients"):
            for draw in range(self._repeats(what, batch)):
                yield rows, self._gradients(what, batch, len(rows), draw, generator)

    def _repeats(self, what: PerSamplePass, batch: Batch) -> int:
        if what.labels != "expected":
            return 1
        with isolated(self.module), self.precision():
            return classes_of(self.loss(self.module, batch))

    def _gradients(
        self, what: PerSamplePass, batch: Batch, size: int, draw: int, generator: torch.Generator
    ) -> RowGradients:
        grad_samples: dict[Block, list[GradSample]] = {}
        failures: list[Exception] = []

        def receive(module: nn.Module, found: dict[str, GradSample]) -> None:
            for block, grad_sample in self.table.sort(module, found):
                grad_samples.setdefault(block, []).append(grad_sample)

        capture = Capture(self.module, receive, failures.append, self.layers, every_pass=True)
        capture.attach()
        try:
            with isolated(self.module), self.precision():
                capture.start_batch(size)
                loss = self.loss(self.module, batch)
                reading = read_loss(loss, size)
                if what.labels == "sampled":
                    sample(loss, generator)
                elif what.labels == "expected":
                    expect(loss, draw)
                parameters = [p for p in self.module.parameters() if p.requires_grad]
                torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            capture.detach()
        if failures:
            raise failures[0]
        if not grad_samples:
            reasons = "; ".join(sorted(set(capture.dropped.values()))) or "no layer of a known type was called"
            raise CaptureError(f"{self.owner}: no layer's gradients can be told apart by rows: {reasons}.")
        return RowGradients(grad_samples, float(size) if reading is None else reading.scale)

    def query_gradients(self) -> dict[Block, Tensor]:
        """Gradients [Q, *layout] of the queries at the present weights, by block; after a per-sample pass.

        Raises:
            QueryError: If a query's value cannot be differentiated.
        """
        blocks = list(self.table)
        parameters = [p for block in blocks for p in block.parameters]
        with isolated(self.module), self.precision():
            found = iter(gradients(self.queries, self.module, parameters, self.to_device))
        with torch.no_grad():
            return {block: block.to_layout([next(found) for _ in block.parameters]) for block in blocks}

    def features(self, layer: str, rows: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """What a layer gets as input, flattened: pairs of dataset indices [b] and features [b, D].

        Args:
            layer: Dotted name of the module.
            rows: Dataset indices; None: all.
        """
        child = self.module.get_submodule(layer)
        for part, batch in self.batches(rows, "features"):
            found: list[Tensor] = []
            handle = child.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].detach()))
            try:
                with isolated(self.module), self.precision(), torch.no_grad():
                    self.loss(self.module, batch)
            finally:
                handle.remove()
            if not found or len(found[0]) != len(part):
                raise CaptureError(
                    f"{self.owner}: layer {layer!r} was not called with one input for each of {len(part)} rows; name "
                    "another one."
                )
            yield part, found[0].flatten(1)
