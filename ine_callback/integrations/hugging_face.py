"""The recorder in a Hugging Face ``Trainer``.

A ``TrainerCallback`` is told of steps, but neither of a batch's rows nor of its loss, and the Trainer fetches the
batches of an accumulated step before the first of them is trained on. So while the one Trainer trains, its loader's
batches carry their rows, and three methods are wrapped: ``get_batch_samples`` (takes the rows off again),
``training_step`` (a batch begins and ends), the accelerator's ``backward`` (the loss as it is differentiated). No event
tells of a training that an exception ends, so ``train`` is wrapped as well, for good: a Trainer may train again.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from ine_callback.data.batches import lent
from ine_callback.data.row_ids import RowBatch, RowTracker
from ine_callback.errors import InfluenceError
from ine_callback.integrations.patches import replaced_method
from ine_callback.methods import Method
from ine_callback.queries.sources import LARGEST_BATCH, DataSource
from ine_callback.recording.config import RecordingConfig
from ine_callback.recording.recorder import Recorder
from ine_callback.recording.store.settings import GradientStore
from ine_callback.report import InfluenceReport
from ine_callback.report.report import save_with_page
from ine_callback.utilities.options import InitialWeights, OnError, Uncaptured

OWNER = "InfluenceTrainerCallback"


class InfluenceTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Records while a Hugging Face ``Trainer`` trains; adds itself to it. Training is bit-identical with and without.

    The report is saved to ``influence`` in the Trainer's output folder. Each ``train()`` is a recording of its own, and
    the report of a later one takes the former's place there; one that an exception ends is reported up to that step.
    One process without float16 scaling; the training set must have a length. A training that is resumed inside of an
    epoch is recorded from the next one on.

    Args:
        trainer: The Trainer, before ``train()``.
        queries: As for :class:`~ine_callback.InfluenceCallback`; ``"val"`` is the Trainer's ``eval_dataset``. A query's
            loss is the Trainer's ``compute_loss``, in evaluation mode.
        methods: Methods to run; f-INE by default.
        initial_weights: ``fixed`` for fine-tuning, ``random`` for training from scratch.
        refresh_every: This and the next five as for :class:`~ine_callback.InfluenceCallback`.
        curvature_every: Optimizer steps between curvature updates; None: ever more.
        rank: Most dimensions of a direction; None: exact.
        discount: Whether to apply the curvature discount.
        max_dim: Sides of a layer larger than this use a diagonal curvature.
        reservoir: Rows whose gradients are stored for the discount across layers.
        store: For queries that come after the training.
        layers: Patterns of the names of the modules to record, e.g. ``["*.h.11.*"]``; None: all.
        max_query_rows: Rows taken of a larger evaluation set, a fixed random sample.
        uncaptured: What to do about parameters without a capture.
        dirpath: Folder of the report, in place of the output folder's.
        on_error: ``"warn"`` stops recording and lets training go on; ``"raise"`` is for tests.

    Attributes:
        report: The report of the last ``train()``.

    Raises:
        InfluenceError: When training begins, for what cannot be recorded.
    """

    def __init__(
        self,
        trainer: Any,
        queries: Any = "val",
        methods: Sequence[Method] | None = None,
        initial_weights: InitialWeights = "fixed",
        refresh_every: int | None = RecordingConfig.refresh_every,
        curvature_every: int | None = RecordingConfig.curvature_every,
        rank: int | None = RecordingConfig.rank,
        discount: bool = RecordingConfig.discount,
        max_dim: int = RecordingConfig.max_dim,
        reservoir: int = RecordingConfig.reservoir,
        store: GradientStore | None = RecordingConfig.store,
        layers: Sequence[str] | None = RecordingConfig.layers,
        max_query_rows: int = 2000,
        uncaptured: Uncaptured = RecordingConfig.uncaptured,
        dirpath: str | Path | None = None,
        on_error: OnError = RecordingConfig.on_error,
    ) -> None:
        self.report: InfluenceReport | None = None
        self._trainer, self._queries, self._max_query_rows = trainer, queries, max_query_rows
        self._methods = methods
        self._config = RecordingConfig(
            refresh_every=refresh_every,
            curvature_every=curvature_every,
            rank=rank,
            discount=discount,
            max_dim=max_dim,
            reservoir=reservoir,
            store=store,
            initial_weights=initial_weights,
            layers=layers,
            uncaptured=uncaptured,
            on_error=on_error,
        )
        self._folder = Path(dirpath or Path(trainer.args.output_dir) / "influence")
        self._recorder: Recorder | None = None
        self._tracker = RowTracker(OWNER, "give a training set whose rows have indices")
        self._rows: deque[Callable[[Any], Tensor] | None] = deque()  # of the batches fetched and not yet trained on
        self._undo: list[Callable[[], None]] = []
        trainer.add_callback(self)
        _wrap(trainer, "train", self._train)

    # -- the life of a training ---------------------------------------------------------------------------------------

    def _train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException as error:
            if self._recorder is not None and self._recorder.running:
                name = type(error).__name__
                self._recorder.guard.note(f"training was ended by {name}: the report covers the steps before")
                self._report(closing=False)
            raise
        finally:
            self._release()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._release()  # auto_find_batch_size begins anew inside of one train()
        self.report = None
        accelerator = self._trainer.accelerator
        if accelerator.num_processes > 1 or args.n_gpu > 1 or accelerator.scaler is not None:
            raise InfluenceError(
                f"{OWNER}: several processes or devices and float16 with a gradient scaler are not supported; train in "
                "one process, in float32 or bfloat16."
            )
        if sum(isinstance(each, InfluenceTrainerCallback) for each in self._trainer.callback_handler.callbacks) > 1:
            raise InfluenceError(f"{OWNER}: one Trainer holds two of them; give one all the queries.")
        self._tracker.track(_plain(kwargs["train_dataloader"]))
        self._recorder = Recorder(
            kwargs["model"],
            getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]),
            rows=self._tracker.size,
            queries=self._queries,
            loss=self._loss,
            methods=self._methods,
            total_steps=state.max_steps - state.global_step,
            schedulers=[(getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"]), 1)],
            accumulate=args.gradient_accumulation_steps,
            source=DataSource(OWNER, self._loss, self._tracker.loader, self._val(), self._max_query_rows),
            to_device=self._trainer._prepare_inputs,
            owner=OWNER,
            config=self._config,
        )
        self._recorder.start()
        if state.global_step:
            self._recorder.guard.note(
                f"recording began at step {state.global_step} of a resumed run; earlier ones are missing"
            )
        self._rows.clear()
        for target, name, wrapped in (
            (self._trainer, "get_batch_samples", self._fetched),
            (self._trainer, "training_step", self._step),
            (accelerator, "backward", self._backward),
        ):
            self._undo.append(_wrap(target, name, wrapped))

    def _val(self) -> list[DataLoader[Any]]:
        """The Trainer's evaluation loaders: one, one for each name, or none."""
        data, loader = self._trainer.eval_dataset, self._trainer.get_eval_dataloader
        if data is None:
            return []
        found = [_plain(loader(name)) for name in data] if isinstance(data, dict) else [_plain(loader())]
        # accelerate's have no batch size, so that a sample could not be drawn, and may drop their last rows
        sized = [hasattr(each.dataset, "__len__") and hasattr(each.dataset, "__getitem__") for each in found]
        return [
            DataLoader(each.dataset, LARGEST_BATCH, collate_fn=each.collate_fn) if known else each
            for each, known in zip(found, sized, strict=True)
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recorder is not None and self._recorder.running:
            self._report(closing=True)
        self._release()

    def _report(self, closing: bool) -> None:
        assert self._recorder is not None
        self._recorder.stop(closing)
        try:
            self.report = self._recorder.report()
            save_with_page(self.report, self._folder)
        except Exception as error:  # a trained model must never be lost to its report
            if self._config.on_error == "raise":
                raise
            unsaved = "the report could not be saved; it is in the callback: .report.save(folder)"
            what = "the report was lost" if self.report is None else unsaved
            warnings.warn(f"{OWNER}: {what}: {type(error).__name__}: {error}", stacklevel=2)

    def _release(self) -> None:
        """Leaves model, Trainer, accelerator and loader as they were found, but for ``train``."""
        if self._recorder is not None:
            self._recorder.stop(closing=False)
        self._recorder = None
        self._tracker.release()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    # -- one step -----------------------------------------------------------------------------------------------------

    def _fetched(self, original: Callable[..., Any], batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        self._rows.clear()  # of a step that the Trainer broke off
        return original(self._stripped(batches), *args, **kwargs)

    def _stripped(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            known = isinstance(batch, RowBatch)
            self._rows.append(partial(self._tracker.rows_of, batch) if known else None)
            yield batch.batch if known else batch

    def _loss(self, module: Any, batch: Any) -> Tensor:
        with self._trainer.compute_loss_context_manager():
            loss: Tensor = self._trainer.compute_loss(module, lent(dict(batch)))  # which may take the labels out
        return loss

    def _step(self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._recorder is not None
        rows = self._rows.popleft() if self._rows else None
        if rows is None:
            self._recorder.guard.note("batches of a resumed epoch do not tell their rows and are missing")
            return original(model, inputs, *args, **kwargs)
        self._recorder.start_batch(rows, inputs)
        loss = original(model, inputs, *args, **kwargs)
        self._recorder.end_batch()
        return loss

    def _backward(self, original: Callable[..., Any], loss: Tensor, **kwargs: Any) -> None:
        assert self._recorder is not None
        self._recorder.see(loss)
        original(loss, **kwargs)
        self._recorder.after_backward()


def _wrap(target: Any, name: str, wrapped: Callable[..., Any]) -> Callable[[], None]:
    """Calls ``wrapped(original, ...)`` in place of a method; what it returns undoes that."""
    original = getattr(target, name)
    return replaced_method(target, name, lambda *args, **kwargs: wrapped(original, *args, **kwargs))


def _plain(loader: Any) -> Any:
    """PyTorch's loader in accelerate's."""
    return getattr(loader, "base_dataloader", loader)
