"""The recorder in a Hugging Face ``Trainer``.

A ``TrainerCallback`` is told of steps, but neither of a batch's rows nor of its loss, and the Trainer fetches the
batches of an accumulated step before the first of them is trained on. So four methods of the one Trainer are wrapped
while it trains: ``get_train_dataloader`` (its batches carry their rows), ``get_batch_samples`` (takes these off again),
``training_step`` (a batch begins and ends), and the accelerator's ``backward`` (the loss as it is differentiated) and
``clip_grad_norm_``.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from ine_callback.errors import InfluenceError
from ine_callback.methods import Method
from ine_callback.options import InitialWeights, OnError, Uncaptured
from ine_callback.recorder import Recorder
from ine_callback.report import InfluenceReport
from ine_callback.report.html import save_with_page
from ine_callback.rows import RowBatch, RowTracker
from ine_callback.sources import DataSource

OWNER = "InfluenceTrainerCallback"


class InfluenceTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Records while a Hugging Face ``Trainer`` trains; adds itself to it. Training is bit-identical with and without.

    The report is saved to ``influence`` in the Trainer's output folder. One process without float16 scaling; the
    training set must have a length. A training that is resumed inside of an epoch is recorded from the next one on.

    Args:
        trainer: The Trainer, before ``train()``.
        queries: As for :class:`~ine_callback.InfluenceCallback`; ``"val"`` is the Trainer's ``eval_dataset``. A query's
            loss is the Trainer's ``compute_loss``, in evaluation mode.
        methods: Methods to run; f-INE by default.
        initial_weights: ``fixed`` for fine-tuning, ``random`` for training from scratch.
        refresh_every: As for :class:`~ine_callback.InfluenceCallback`; None: planned.
        max_query_rows: Rows taken of a larger evaluation set, a fixed random sample.
        uncaptured: What to do about parameters without a capture.
        dirpath: Folder of the report, in place of the output folder's.
        on_error: ``"warn"`` stops recording and lets training go on; ``"raise"`` is for tests.

    Attributes:
        report: The report, after ``train()``.

    Raises:
        InfluenceError: When training begins, for what cannot be recorded.
    """

    def __init__(
        self,
        trainer: Any,
        queries: Any = "val",
        methods: Sequence[Method] | None = None,
        initial_weights: InitialWeights = "fixed",
        refresh_every: int | None = None,
        max_query_rows: int = 2000,
        uncaptured: Uncaptured = "warn",
        dirpath: str | Path | None = None,
        on_error: OnError = "warn",
    ) -> None:
        self.report: InfluenceReport | None = None
        self._trainer, self._queries, self._max_query_rows = trainer, queries, max_query_rows
        self._options: dict[str, Any] = {"methods": methods, "initial_weights": initial_weights}
        self._options |= {"refresh_every": refresh_every, "uncaptured": uncaptured, "on_error": on_error}
        self._folder = Path(dirpath or Path(trainer.args.output_dir) / "influence")
        self._recorder: Recorder | None = None
        self._tracker = RowTracker(OWNER)
        self._rows: deque[Tensor | None] = deque()  # of the batches fetched and not yet trained on
        self._undo: list[Callable[[], None]] = []
        trainer.add_callback(self)
        self._wrap(trainer, "get_train_dataloader", self._tracked)

    def _wrap(self, target: Any, name: str, wrapped: Callable[..., Any]) -> None:
        """Calls ``wrapped(original, ...)`` in place of a method, until :meth:`_release`."""
        original = getattr(target, name)
        target.__dict__[name] = lambda *args, **kwargs: wrapped(original, *args, **kwargs)
        self._undo.append(lambda: target.__dict__.pop(name, None))

    # -- the rows -----------------------------------------------------------------------------------------------------

    def _tracked(self, original: Callable[..., Any]) -> Any:
        loader = original()
        self._tracker.track(getattr(loader, "base_dataloader", loader))
        return loader

    def _fetched(self, original: Callable[..., Any], batches: Iterator[Any], *args: Any) -> Any:
        return original(self._stripped(batches), *args)

    def _stripped(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            known = isinstance(batch, RowBatch)
            self._rows.append(batch.rows if known else None)
            yield batch.batch if known else batch

    # -- the life of a training ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes > 1 or args.n_gpu > 1 or accelerator.scaler is not None:
            raise InfluenceError(
                f"{OWNER}: several processes or devices and float16 with a gradient scaler are not supported; train in "
                "one process, in float32 or bfloat16."
            )
        val = [self._trainer.get_eval_dataloader()] if self._trainer.eval_dataset is not None else []
        plain = [getattr(loader, "base_dataloader", loader) for loader in val]
        scheduler = kwargs["lr_scheduler"]
        self._recorder = Recorder(
            kwargs["model"],
            getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]),
            rows=self._tracker.size,
            queries=self._queries,
            loss=self._loss,
            total_steps=state.max_steps - state.global_step,
            schedulers=[(getattr(scheduler, "scheduler", scheduler), 1)],
            accumulate=args.gradient_accumulation_steps,
            source=DataSource(OWNER, self._loss, self._tracker.loader, plain, self._max_query_rows),
            to_device=self._trainer._prepare_inputs,
            owner=OWNER,
            **self._options,
        )
        self._recorder.start()
        self._rows.clear()
        self._wrap(self._trainer, "get_batch_samples", self._fetched)
        self._wrap(self._trainer, "training_step", self._step)
        self._wrap(accelerator, "backward", self._backward)
        self._wrap(accelerator, "clip_grad_norm_", self._clip)

    def _loss(self, module: Any, batch: Any) -> Tensor:
        loss: Tensor = self._trainer.compute_loss(module, dict(batch))  # which may take the labels out
        return loss

    def _step(self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any) -> Any:
        assert self._recorder is not None
        rows = self._rows.popleft() if self._rows else None
        if rows is None:
            self._recorder.note("batches of a resumed epoch do not tell their rows and are missing")
            return original(model, inputs, *args)
        self._recorder.start_batch(rows, inputs)
        loss = original(model, inputs, *args)
        self._recorder.end_batch()
        return loss

    def _backward(self, original: Callable[..., Any], loss: Tensor, **kwargs: Any) -> None:
        assert self._recorder is not None
        self._recorder.see(loss)
        original(loss, **kwargs)
        self._recorder.after_backward()

    def _clip(self, original: Callable[..., Any], parameters: Any, max_norm: float, *args: Any) -> Any:
        assert self._recorder is not None
        if max_norm < float("inf"):  # else it is asked for the norm alone
            self._recorder.measure_clipping()
        return original(parameters, max_norm, *args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorder = self._recorder
        if recorder is None or not recorder.running:
            return
        recorder.stop()
        self._release()
        try:
            self.report = recorder.report()
            if state.is_world_process_zero:
                save_with_page(self.report, self._folder)
        except Exception as error:  # a trained model must never be lost to its report
            if self._options["on_error"] == "raise":
                raise
            warnings.warn(f"{OWNER}: no report was saved: {type(error).__name__}: {error}", stacklevel=2)

    def _release(self) -> None:
        """Leaves Trainer, accelerator and loader as they were found."""
        self._tracker.release()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
