"""The Lightning callback: hooks that drive the recorder. No mathematics here."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ine_callback.capture.compiled import forget_compiled
from ine_callback.distributed.sharding import is_sharded
from ine_callback.errors import InfluenceError
from ine_callback.integrations.checkpoints import KEY, resume, save
from ine_callback.integrations.loggers import RunLog, report_folder
from ine_callback.integrations.progress import progress_of
from ine_callback.integrations.row_tracking import TrackedRows
from ine_callback.integrations.trainer import (
    evaluating,
    is_known,
    replaced,
    schedulers_of,
    splits_tensors,
    steps_ahead,
    touches_gradients,
    transferred,
    unscale,
)
from ine_callback.methods import FitContext, FitEndMethod, FitEndMethods, Method, split_methods
from ine_callback.methods.observation_counts import ObservationCounts
from ine_callback.optimizers.registry import summed_rates
from ine_callback.queries import Query, parse
from ine_callback.queries.module_loss import ModuleLoss
from ine_callback.queries.sources import DataSource
from ine_callback.recording.config import RecordingConfig
from ine_callback.recording.provenance import SINGLE_ROW
from ine_callback.recording.recorder import Recorder
from ine_callback.recording.store.settings import GradientStore
from ine_callback.report import InfluenceReport
from ine_callback.report.report import save_with_page
from ine_callback.scores import Scores, Stage
from ine_callback.utilities.isolation import unmoved
from ine_callback.utilities.options import InitialWeights, OnError, Uncaptured, check_count


class InfluenceCallback(Callback):
    """Records during ``Trainer.fit`` which training rows made the model what it is.

    For every training row and query it accumulates a signed Gaussian influence mu (f-INE, arXiv 2510.10510) from the
    live forward and backward pass, and at the end of the fit holds and saves an :class:`~ine_callback.InfluenceReport`.
    A positive score means that training on the row *lowers* the query (helpful). Training itself is bit-identical with
    and without the callback.

    Args:
        queries: What to measure rows against: ``"val"`` (mean loss of the trainer's validation loader), ``"self"`` (the
            row's own loss: finds mislabelled rows), a :class:`~ine_callback.Query`, a callable
            ``(module, batch) -> scalar``, a list of these, or a mapping of names to these, to DataLoaders, batches or
            lists of dataset indices.
        methods: Methods to run; :class:`~ine_callback.FINE` by default. Without it, as in ``[BIF()]``, no pass of the
            training is read, and the report has no f-INE score.
        enabled: Switches everything off without removing the callback.
        refresh_every: Optimizer steps between refreshes of the queries' gradients; None: 20 at first, later an eighth
            of the steps so far (docs/methods/fine.md has the measured price of each choice).
        curvature_every: Optimizer steps between curvature updates, which are averaged over the run; None: 4 at first,
            later a 64th of the steps so far.
        rank: Most dimensions of a layer's inputs, for each query, in which directions are held, where those keep 99 %
            of the signals' variance (else all). None: all, always, and self-influence without sketches (slow).
        discount: Whether the curvature of the rest of training discounts early steps (recommended: it is what makes
            the scores agree with retraining). Off: the paper's first-order signal.
        max_dim: Sides of a layer larger than this use a diagonal curvature.
        reservoir: Rows whose per-sample gradients are stored (at most 256 MB) for the part of the discount that sees
            across layers; 0: none.
        initial_weights: ``random`` (training from scratch) counts the draw of the initial weights as training
            randomness, the scale of mu; ``fixed`` (fine-tuning) only the order of the rows.
        max_query_rows: Rows taken of a larger query loader, a fixed random sample.
        row_fn: Maps a batch to the dataset index of each of its rows [b]; needed where the loader does not tell them
            (iterable datasets, collate functions that cannot be followed). Batches may be objects of any class.
        num_rows: Number of training rows, where the dataset has no length.
        layers: Names of the modules to record, as patterns (``["model.h.11.*", "head"]``); None: all. Fewer cost less,
            and the scores speak for their parameters alone.
        uncaptured: Trainable parameters without a capture are named (``"warn"``), refused (``"raise"``) or recorded by
            per-row autograd (``"fallback"``, slow: one backward pass a row).
        store: Keeps what the run did with each row, for queries that come after the fit (docs/howto/ask-later.md).
        dirpath: Folder of the report (Parquet, JSON and, with the extra ``report``, HTML); by default ``influence`` in
            the run's log folder (of W&B and MLflow: beside its checkpoints); nothing is saved without a logger.
        show_rows: Whether the HTML shows the most extreme training rows themselves. Off: it holds scores alone.
        log_scores: Whether the trainer's loggers get scalars at the end of an epoch, and at the end of the fit the
            report (its page without training rows).
        on_error: ``"warn"`` stops recording and lets training go on, ``"raise"`` is for tests.

    Attributes:
        report: The report, after the fit.

    Raises:
        InfluenceError: For arguments that cannot be right.

    Example:
        >>> from ine_callback import FINE, InfluenceCallback, Query
        >>> influence = InfluenceCallback(queries=["val", "self", Query.margin("val")], methods=[FINE(null_draws=8)])
        >>> influence.enabled
        True
    """

    steps_back = False  # for another one of the same Trainer

    @property
    def owner(self) -> str:
        """Named in messages."""
        return type(self).__name__

    def __init__(
        self,
        queries: str
        | Query
        | list[str | Query]
        | dict[str, str | Query | list[int]]
        | dict[str, Any]
        | Callable[..., Any] = "val",
        methods: list[Method | FitEndMethod] | None = None,
        enabled: bool = True,
        refresh_every: int | None = RecordingConfig.refresh_every,
        curvature_every: int | None = RecordingConfig.curvature_every,
        rank: int | None = RecordingConfig.rank,
        discount: bool = RecordingConfig.discount,
        max_dim: int = RecordingConfig.max_dim,
        reservoir: int = RecordingConfig.reservoir,
        initial_weights: InitialWeights = RecordingConfig.initial_weights,
        max_query_rows: int = 2000,
        row_fn: Callable[[Any], Tensor] | None = None,
        num_rows: int | None = None,
        layers: list[str] | None = None,
        uncaptured: Uncaptured = RecordingConfig.uncaptured,
        store: GradientStore | None = RecordingConfig.store,
        dirpath: str | Path | None = None,
        show_rows: bool = True,
        log_scores: bool = True,
        on_error: OnError = RecordingConfig.on_error,
    ) -> None:
        owner = self.owner
        self.queries, self.methods, self.enabled = queries, methods, enabled
        self.refresh_every, self.curvature_every, self.rank = refresh_every, curvature_every, rank
        self.discount, self.max_dim = discount, max_dim
        self.max_query_rows, self.row_fn, self.num_rows = max_query_rows, row_fn, num_rows
        self.reservoir, self.layers, self.uncaptured, self.store = reservoir, layers, uncaptured, store
        self.initial_weights: InitialWeights = initial_weights
        self.dirpath, self.show_rows, self.on_error = dirpath, show_rows, on_error
        self.log_scores = log_scores
        self._config.check(owner)
        check_count(owner, "max_query_rows", max_query_rows)
        parse(queries, owner)
        if methods is not None:
            split_methods(methods, owner)
        self.report: InfluenceReport | None = None
        self._rows: TrackedRows | None = None
        self._recorder: Recorder | None = None
        self._fit_end = FitEndMethods([], owner)
        self._log: RunLog | None = None
        self._saved: dict[str, Any] = {}
        self._folder: Path | None = None

    @property
    def _config(self) -> RecordingConfig:
        """The options of the recording, as they are now."""
        return RecordingConfig(**{each.name: getattr(self, each.name) for each in fields(RecordingConfig)})

    # -- setting up ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._recorder = self._log = None
        if not (self.enabled and stage == "fit"):
            return
        if not is_known(trainer.strategy):
            raise InfluenceError(
                f"{self.owner}: whole gradients cannot be had under {type(trainer.strategy).__name__}; train with "
                "strategy='ddp', ModelParallelStrategy (FSDP2) or devices=1, or pass enabled=False."
            )
        rivals = (c for c in trainer.callbacks if isinstance(c, InfluenceCallback) and not c.steps_back)  # type: ignore[attr-defined]
        if sum(rival.enabled for rival in rivals) > 1:
            raise InfluenceError(f"{self.owner}: one Trainer holds two of them; give one all the queries.")
        self.report, self._saved = None, {}
        self._rows = TrackedRows(trainer, pl_module, self.owner, self.row_fn)
        forget_compiled()  # now: what the sanity check will compile is the training's

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rows is None:
            return
        try:
            self._start(trainer, pl_module)
        except InfluenceError:
            raise
        except Exception as error:  # the user can train without the recording
            if self.on_error == "raise":
                raise
            if self._recorder is not None:
                self._recorder.stop()
            self._recorder = None
            warnings.warn(f"{self.owner}: nothing is recorded: {type(error).__name__}: {error}", stacklevel=2)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._rows is not None
        if splits_tensors(trainer.strategy):
            raise InfluenceError(
                f"{self.owner}: tensor parallelism is not supported; use ModelParallelStrategy(tensor_parallel_size=1) "
                "or pass enabled=False."
            )
        loaders = tree_leaves(trainer.train_dataloader)
        if self.row_fn is None and len(loaders) != 1:
            raise InfluenceError(f"{self.owner}: {len(loaders)} training loaders have no common rows; pass row_fn=.")
        loss = self._loss = ModuleLoss(pl_module, self.owner)
        training, ending = (None, []) if self.methods is None else split_methods(self.methods, self.owner)
        training = [ObservationCounts()] if training == [] else training
        val = [] if trainer.val_dataloaders is None else tree_leaves(trainer.val_dataloaders)
        self._source = DataSource(self.owner, loss, loaders[0], val, self.max_query_rows)
        self._recorder = Recorder(
            pl_module,
            trainer.optimizers,
            rows=self.num_rows or self._rows.tracker.size,
            queries=self.queries,
            loss=loss.training,
            methods=training,
            total_steps=steps_ahead(trainer),
            schedulers=schedulers_of(trainer),
            accumulate=trainer.accumulate_grad_batches,
            distributed=trainer.world_size > 1,
            source=self._source,
            to_device=lambda batch: transferred(trainer, batch),
            context=lambda: evaluating(trainer),
            owner=self.owner,
            config=self._config,
        )
        for lane in self._recorder.lanes:
            lane.clipping.watching = touches_gradients(trainer, pl_module)
        recent = self._recorder.closing.recent
        unreadable = self._source.unreadable(self.row_fn) if recent.wanted or ending else ""
        recent.wanted &= bool(unreadable)  # else rows are read by their index
        self._recorder.start(fresh=True)
        self._warn_of_single_rows(trainer, loaders[0], self._recorder)
        self._folder = report_folder(trainer, self.dirpath)  # now: loggers ask all processes, and later one may be gone
        self._fit_end = FitEndMethods(ending, self.owner, self.on_error)
        infos = [query.info for query in self._recorder.bound]
        self._fit_end.check(infos, is_sharded(pl_module), unreadable, trainer.world_size, self._source)
        self._log = RunLog(trainer, self.owner, self.on_error == "raise") if self.log_scores else None
        if trainer.global_step:
            saved, self._saved = self._saved, {}
            resume(saved, trainer, self._recorder, self._fit_end, self.on_error)

    def _warn_of_single_rows(self, trainer: Trainer, loader: Any, recorder: Recorder) -> None:
        """Before a long training; where batches tell no size, the first step does."""
        rows = getattr(loader, "batch_size", None) == 1 and trainer.accumulate_grad_batches * trainer.world_size == 1
        if rows and trainer.lightning_module.automatic_optimization and recorder.infos:
            recorder.guard.warn(SINGLE_ROW)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    # Not state_dict: with that Lightning lets no second callback into a Trainer, be it switched off.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._recorder is not None:
            save(checkpoint, self._recorder, self._fit_end, self.on_error)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get(KEY, {})

    # -- one step -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._recorder is not None and self._rows is not None:
            if fault := self._rows.hooks.fault(pl_module, lambda batch: transferred(trainer, batch)):
                self._recorder.guard.warn(fault)
            self._recorder.capture.unscale = unscale(trainer)
            self._loss.batch_idx = batch_idx  # a penalty may come in every 16th batch only
            self._recorder.start_batch(self._rows.rows, batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._recorder is not None:
            self._recorder.capture.unscale = unscale(trainer)  # another optimizer's step may have changed it
            self._recorder.see(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is not None:
            self._recorder.end_batch()
            self._loss.batch_idx = 0
            if pl_module.automatic_optimization and not trainer.fit_loop._should_accumulate():
                self._recorder.discard()  # by hand gradients may be gathered over batches
            self._recorder.update()

    # -- methods that run on a trained model --------------------------------------------------------------------------

    def _run_fit_end(self, trainer: Trainer, pl_module: LightningModule, at: Stage, scores: Scores | None) -> None:
        """Runs the methods that are due; one that fails is noted, and the others go on."""
        assert self._recorder is not None
        recorder = self._recorder
        if not self._fit_end.due(at):
            return
        with recorder.capture.paused():
            context = replace(
                self._context(trainer, pl_module),
                scores=scores if scores is not None and scores.queries else None,
                factors=recorder.signals.curvature,
                gradient_sample=recorder.signals.reservoir if recorder.signals.curvature is not None else None,
                at=at,
            )
            self._fit_end.run(context)

    def _context(self, trainer: Trainer, pl_module: LightningModule) -> FitContext:
        """The model at its present weights, with its rows by their indices."""
        assert self._recorder is not None
        return FitContext(
            pl_module,
            self._recorder.bound,
            self._source,
            self._loss.training,
            lambda batch: transferred(trainer, batch),
            lambda: evaluating(trainer),
            progress=progress_of(trainer),
            layers=self.layers,
            owner=self.owner,
            rows_of=self.row_fn,
            summed_rates=partial(summed_rates, self._recorder.training.optimizer, self._recorder.schedule.realised),
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None:
            self._run_fit_end(trainer, pl_module, trainer.current_epoch + 1, None)
        if self._recorder is not None and self._recorder.recording and self._log is not None:
            self._log.epoch(self._recorder.accumulators.scores)

    # -- the end ------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is None or not self._recorder.running:
            return
        if told := replaced(trainer, (lane.optimizer for lane in self._recorder.lanes)):
            self._recorder.guard.warn(told)
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            read = partial(self._context, trainer, pl_module)
            self._recorder.close(None if self._recorder.closing.recent.wanted else read)
        self._recorder.stop(closing=False)
        try:
            self.report = self._recorder.report()
            self.report = self._with_attributions(trainer, pl_module, self.report)
            folder = self._folder
            if folder is not None and trainer.is_global_zero:
                rank_zero_info(f"{self.owner}: writing the influence report to {folder}")
                loader = self._rows.tracker.loader if self._rows is not None and self.show_rows else None
                rows = None if loader is None else loader.dataset  # unknown with row_fn
                with unmoved(rows):
                    save_with_page(self.report, folder, rows)
            if self._log is not None:
                self._log.end(self.report)
        except Exception as error:  # a trained model must never be lost to its report
            if self.on_error == "raise":
                raise
            unsaved = "the report could not be saved; it is in the callback: .report.save(folder)"
            what = "the report was lost" if self.report is None else unsaved
            warnings.warn(f"{self.owner}: {what}: {type(error).__name__}: {error}", stacklevel=2)

    def _with_attributions(
        self, trainer: Trainer, pl_module: LightningModule, report: InfluenceReport
    ) -> InfluenceReport:
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            self._run_fit_end(trainer, pl_module, "end", report.scores)
        run = replace(report.run, notes=[*report.run.notes, *self._fit_end.notes, *self._fit_end.missed()])
        return InfluenceReport(report.scores, run, self._fit_end.found, report.store)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._recorder is not None and self._recorder.running:
            self._recorder.guard.note(
                f"training was ended by {type(exception).__name__}: the report covers the steps before"
            )
            self.on_train_end(trainer, pl_module)
        self._release()

    def _release(self) -> None:
        """Leaves trainer, loaders and module as they were found; the recorder stays for checkpoints still to come."""
        with contextlib.ExitStack() as stack:  # both, whatever fails
            if self._rows is not None:
                stack.callback(self._rows.release)
            if self._recorder is not None:
                stack.callback(self._recorder.stop, closing=False)
        self._rows = None
