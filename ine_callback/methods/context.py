"""What a method that runs on a trained model may ask for: data, queries, and gradients from isolated passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture import Block, BlockTable, Capture, GradSample
from ine_callback.capture.entries import EntryIndex
from ine_callback.capture.entry_order import entry_faults
from ine_callback.capture.first_batch import first_batch_faults
from ine_callback.capture.label_gradients import expect, labels_of, sample
from ine_callback.capture.row_losses import read_loss
from ine_callback.capture.verification import Verification, fraction_of, uncaptured
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.curvature.kfac import KFAC
from ine_callback.data.row_entries import row_entries
from ine_callback.distributed.processes import Processes
from ine_callback.errors import CaptureError, InfluenceError
from ine_callback.methods.passes import PerSamplePass
from ine_callback.methods.row_gradients import RowGradients
from ine_callback.queries import Batch, BoundQuery, gradients, values
from ine_callback.queries.sources import DataSource, in_order
from ine_callback.scores import QueryInfo, Scores, Stage
from ine_callback.utilities.isolation import isolated
from ine_callback.utilities.tracking import Track, untracked

TOGETHER = 64  # rows of a pass's batch


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
        recent: Training rows as pairs of indices [b] and batches, in place of the source's.
        notes: Sentences for the report, such as which parameters per-sample gradients leave out.
        rows_of: What names the rows of a batch, where rows do not lead (``row_fn``).
        summed_rates: What the run's learning rates add up to for some parameters, by curvature and by weight decay
            (:func:`~ine_callback.optimizers.registry.summed_rates`); None where there was no run.
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
    recent: Sequence[tuple[Tensor, Batch]] | None = None
    notes: list[str] = field(default_factory=list)
    rows_of: Callable[[Batch], Any] | None = None
    summed_rates: Callable[[Sequence[nn.Parameter]], tuple[Tensor | float, Tensor | float]] | None = None

    def __post_init__(self) -> None:
        self.table = BlockTable(self.module)
        self._held: list[tuple[Block, GradSample]] = []
        self._failures: list[Exception] = []
        self._capture = Capture(self.module, self._receive, self._failures.append, self.layers, every_pass=True)
        self._dropped: set[str] | None = None  # modules left out when the first batch was verified

    @property
    def rows(self) -> int:
        """Number of training rows N."""
        return self.source.training_rows

    @property
    def infos(self) -> tuple[QueryInfo, ...]:
        """The queries' names and questions."""
        return tuple(query.info for query in self.queries)

    def batches(self, rows: Sequence[int] | None = None, what: str = "rows") -> Iterator[tuple[Tensor, Batch]]:
        """Training rows, by their indices [b] and as batches on the device.

        In the data set's order, but for what a collate function sorts, and without what it drops.
        """
        if self.recent is not None and rows is None:
            for which, batch in self.progress(self.recent, what):
                yield which, self._on_device(batch)
            return
        chosen = torch.arange(self.rows) if rows is None else torch.as_tensor(list(rows), dtype=torch.int64)
        for part in self.progress(chosen.split(TOGETHER), what):
            which, batch = self.source.followed(part.tolist(), self.rows_of is not None)
            yield torch.tensor(which), self._on_device(batch)

    def in_order(self, what: str) -> Iterator[Batch]:
        """All training rows as batches in the data set's order; of a stream in that of its last pass.

        Raises:
            QueryError: If a collate function drops rows.
        """
        if self.recent is not None:
            yield from (batch for _, batch in self.batches(what=what))
            return
        for wanted, (found, batch) in zip(
            torch.arange(self.rows).split(TOGETHER), self.batches(what=what), strict=True
        ):
            yield in_order(wanted.tolist(), found.tolist(), batch, self.owner)

    @contextlib.contextmanager
    def without_progress(self) -> Iterator[None]:
        """No progress bar for each of many small passes."""
        before, self.progress = self.progress, untracked
        try:
            yield
        finally:
            self.progress = before

    def _on_device(self, batch: Batch) -> Batch:
        """As evaluation moves it: hooks that augment training batches leave these alone."""
        with self.precision():
            return self.to_device(batch)

    def per_sample(self, what: PerSamplePass | None = None) -> Iterator[tuple[Tensor, RowGradients]]:
        """Every training row's gradient at the present weights: pairs of dataset indices [b] and gradients.

        Args:
            what: Which labels and rows; by default the rows' own, all.

        Raises:
            CaptureError: If no layer's gradients can be told apart by rows.
            InfluenceError: If the loss has no labels to draw.
        """
        what = what or PerSamplePass()
        generator = torch.Generator(next(self.module.parameters()).device).manual_seed(self.seed + what.draw)
        for rows, batch in self.batches(what.rows, "per-sample gradients"):
            for draw in range(self._repeats(what, batch, len(rows))):
                yield rows, self._gradients(what, batch, len(rows), draw, generator)

    def labels(self) -> int | None:
        """How many labels ``PerSamplePass("expected")`` goes through for each row; None where it cannot."""
        rows = list(range(min(2, self.rows)))
        batch = self._on_device(self.source.training(rows))
        try:
            return self._labels_of(batch, len(rows))
        except InfluenceError:
            return None

    def _repeats(self, what: PerSamplePass, batch: Batch, size: int) -> int:
        if what.labels != "expected":
            return 1
        return self._labels_of(batch, size)

    def _labels_of(self, batch: Batch, size: int) -> int:
        self._capture.attach()  # which marks the layers' calls: what is beside them is no row's
        try:
            with isolated(self.module), self.precision():
                return labels_of(self.loss(self.module, batch), size)
        finally:
            self._capture.detach()

    def _gradients(
        self, what: PerSamplePass, batch: Batch, size: int, draw: int, generator: torch.Generator
    ) -> RowGradients:
        capture, parameters = self._capture, [p for p in self.module.parameters() if p.requires_grad]
        self._held.clear()
        capture.attach()
        try:
            entries = self._entries(batch, size)
            if self._dropped is None:
                self._check_layers(batch, size, entries)
            verification = Verification(self._failures.append, None, keep=False) if self._dropped is None else None
            with isolated(self.module), self.precision():
                capture.start_batch(size, entries)
                loss = self.loss(self.module, batch)
                reading = read_loss(loss, size, max(capture.views, capture.loss_views), entries)
                if what.labels == "sampled":
                    sample(loss, generator)
                elif what.labels == "expected":
                    expect(loss, draw, size)
                for parameter in capture.see(loss, verification):
                    self.table.tie(parameter)
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            capture.detach()
            if verification is not None:
                verification.close()
        if self._failures:
            raise self._failures.pop()
        if verification is not None:
            self._verify(verification, parameters, found)
        elif late := [f"{n}: {why}" for n, why in capture.dropped.items() if n not in (self._dropped or ())]:
            raise CaptureError(f"{self.owner}: per-sample gradients ended early: {'; '.join(late)}.")
        grad_samples: dict[Block, list[GradSample]] = {}
        for block, grad_sample in self._held:
            grad_samples.setdefault(block, []).append(grad_sample)
        if not grad_samples:
            reasons = "; ".join(sorted(set(capture.dropped.values()))) or "no layer of a known type was called"
            raise CaptureError(f"{self.owner}: no layer's gradients can be told apart by rows: {reasons}.")
        if reading is None:
            self._note("per-sample gradients: the loss is of an unknown form, and taken as a mean over a batch's rows")
        if reading is None:
            return RowGradients(grad_samples, loss.new_full((size,), size), size)
        return RowGradients(grad_samples, reading.own, reading.terms)

    def _receive(self, module: nn.Module, found: dict[str, GradSample]) -> None:
        self._held += self.table.sort(module, found)

    def _entries(self, batch: Batch, size: int) -> EntryIndex | None:
        """The row of each entry of a batch in which rows do not lead."""
        given = None if self.rows_of is None else row_entries(self.rows_of(batch))
        if given is None:
            return None
        return EntryIndex(given, size, next(self.module.parameters()).device, self.owner)

    def _check_layers(self, batch: Batch, size: int, entries: EntryIndex | None) -> None:
        """Drops layers whose inputs are not led by the batch's rows, or whose layer function is wrong."""
        if size < 2:
            return

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            with self.precision():
                return self.loss(module, batch)

        # these passes are in evaluation mode, so what a training step does to its rows is no fault here
        if entries is None:
            faults, unchecked = first_batch_faults(self.module, self._capture, loss, batch, size, False, views=True)
        else:
            self._capture.entries = entries
            faults, unchecked = entry_faults(self.module, self._capture, loss, batch, size, self.rows_of)
        for note in unchecked:
            self._note(f"per-sample gradients: {note}")
        for module, reason in faults.items():
            self._capture.drop(module, reason)

    def _verify(
        self, verification: Verification, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
    ) -> None:
        """Leaves out, and names, what does not add up to autograd's gradients or has no gradients by rows."""
        for block, grad_sample in self._held:
            verification.take(block, grad_sample)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and not parameter.is_complex():  # of a layer that the hooks leave out
                verification.compare(parameter, parameter, gradient)
        if self._failures:
            raise self._failures.pop()
        capture = self._capture
        of_no_row = capture.bare.of_no_row
        wrong, _, finite = verification.judge(self.table, capture.half, capture.double_backward, of_no_row)
        if not finite:
            raise CaptureError(
                f"{self.owner}: gradients of the first {TOGETHER} rows asked for are not finite; look for inputs or "
                "weights that are not."
            )
        names = {p: name for name, p in self.module.named_parameters()}
        missing = {names[p]: reason for block, reason in wrong.items() for p in block.parameters}
        for block in wrong:
            self.table.drop(block)
        self._held = [(block, grad_sample) for block, grad_sample in self._held if block not in wrong]
        used = {p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        used -= verification.without_rows(of_no_row)
        dropped, unknown = self._capture.dropped, self._capture.bare.unknown
        missing = uncaptured(self.module, self.table.captured(), dropped, used, unknown) | missing
        unasked = {name for name in missing if name.rpartition(".")[0] in self._capture.deselected}
        if unasked:
            self._note(f"layers= leaves out {fraction_of(self.module, unasked):.1%} of the trainable parameters")
        for name, why in missing.items():
            if name not in unasked:
                self._note(f"per-sample gradients leave out {name}: {why}")
        self._dropped = set(self._capture.dropped)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def query_gradients(self, queries: Sequence[BoundQuery] | None = None) -> dict[Block, Tensor]:
        """Gradients [Q, *layout] of the queries at the present weights, by block; after a per-sample pass.

        Args:
            queries: Other ones than the run's, or some of them.

        Raises:
            QueryError: If a query's value cannot be differentiated.
        """
        blocks = list(self.table)
        parameters = [p for block in blocks for p in block.parameters]
        with isolated(self.module), self.precision():
            found = gradients(queries or self.queries, self.module, parameters, self.to_device)
        with torch.no_grad():
            each = iter(found)
            return {block: block.to_layout([next(each) for _ in block.parameters]) for block in blocks}

    def query_values(self) -> Tensor:
        """Values [Q] of the queries at the present weights."""
        with isolated(self.module), self.precision():
            return values(self.queries, self.module, self.to_device)

    def features(self, layer: str, rows: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """What a layer gets as input, flattened: pairs of dataset indices [b] and features [b, D].

        Args:
            layer: Dotted name of the module.
            rows: Dataset indices; None: all.
        """
        for part, batch in self.batches(rows, "features"):
            yield part, self.layer_input(layer, self.loss, batch, len(part))[1].detach()

    def layer_input(
        self, layer: str, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch, size: int
    ) -> tuple[Tensor, Tensor]:
        """One batch's loss, and what a layer gets as input meanwhile, flattened [size, D]; both with their graphs.

        Args:
            layer: Dotted name of the module.
            loss: Computes the loss, such as :attr:`loss`, or for data of queries ``source.loss``.
            batch: On the device.
            size: Its number of rows.

        Raises:
            CaptureError: If the layer does not get one input for each row, once.
        """
        found: list[Any] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else next(iter(kwargs.values()), None))

        handle = self.module.get_submodule(layer).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with isolated(self.module), self.precision():
                value = loss(self.module, batch)
        finally:
            handle.remove()
        if len(found) != 1 or not isinstance(found[0], Tensor) or len(found[0]) != size:
            raise CaptureError(
                f"{self.owner}: layer {layer!r} was called {len(found)} times for a batch, not once with one input "
                f"for each of {size} rows; name another one."
            )
        return value, found[0].flatten(1)
