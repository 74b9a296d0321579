"""The stages of a fit: chains around the weights of the moment, with the trainer's data, queries and precision."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from numpy.typing import NDArray
from torch import Tensor, nn

from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.rowloss import RowLoss, row_losses
from ine_callback.methods.bif.run import MAX_ROWS, bif_scores, prepared, term_limit
from ine_callback.methods.bif.scores import BIFScores, Stage
from ine_callback.methods.bif.settings import BIF
from ine_callback.queries import Batch, BoundQuery
from ine_callback.queries.sources import DataSource
from ine_callback.report import bif_store
from ine_callback.scores import Floats
from ine_callback.utilities.isolation import isolated

MAX_DATA = 20_000  # rows that the posterior's mean loss is taken over


class Stages:
    """Runs a fit's chains when their time has come, and keeps what they found.

    Args:
        bif: Settings; ``rows`` are dataset indices.
        module: The model.
        source: The training set.
        bound: The run's queries.
        to_device: What the trainer does to a batch.
        context: The trainer's precision.
        bar: The trainer's progress bar.
        owner: Class named in messages.
        loss_fn: See :func:`ine_callback.methods.bif.run.bif_scores`.

    Attributes:
        found: One entry for each stage at which chains ran.
    """

    def __init__(
        self,
        bif: BIF,
        module: nn.Module,
        source: DataSource,
        bound: list[BoundQuery],
        to_device: Callable[[Batch], Batch],
        context: Callable[[], contextlib.AbstractContextManager[Any]],
        bar: ProgressBar | None,
        owner: str,
        loss_fn: RowLoss | None = None,
    ) -> None:
        if not bound:
            raise InfluenceError(f"{owner}: BIF has no query: 'self' is f-INE's alone; add 'val' or another one.")
        self.bif, self._module, self._source, self._bound = bif, module, source, bound
        self._to_device, self._context, self._bar, self._owner = to_device, context, bar, owner
        self._loss_fn = loss_fn
        self.found: list[BIFScores] = []
        self._reached: set[Stage] = set()

    def run(self, at: Stage, mu: Floats | None = None) -> None:
        """Runs the chains of a stage, if it is one of the settings'.

        Args:
            at: Finished epochs, or ``"end"``.
            mu: f-INE's scores [N, Q], if there are any yet; they choose among the rows of a large training set.

        Raises:
            InfluenceError: If rows, row losses or queries cannot be had.
            KeyboardInterrupt: Again, where Ctrl-C ended the chains in the middle of training: it is meant for both.
        """
        if at not in self.bif.at:
            return
        self._reached.add(at)
        bif, count = self.bif, self._source.training_rows
        scored, notes = _scored(bif, count, self._most(), mu)
        data = _data(scored, count)
        train = self._to_device(self._source.training(data.tolist()))
        if len(data) < count:
            notes.append(f"BIF: the posterior's mean loss is over {len(data):,} of {count:,} rows")
        place = np.searchsorted(data, scored)
        found = bif_scores(
            self._module,
            train,
            {query.info.name: _fast(self._module, query, self._source, self._to_device) for query in self._bound},
            replace(bif, rows=place.tolist()),
            self._loss_fn,
            progress=lambda draws: _track(self._bar, draws),
            context=self._context,
            owner=self._owner,
            at=at,
        )
        self.found.append(replace(found, rows=data[found.rows], notes=(*notes, *found.notes)))
        if found.interrupted and at != "end":
            raise KeyboardInterrupt

    def _most(self) -> int:
        """Rows scored where the settings name none."""
        if not self.bif.per_token:
            return MAX_ROWS
        sample = self._to_device(self._source.training([0]))
        with prepared(self._module, sample, self._loss_fn, self._context, self._owner) as (_, _, sample, losses):
            return term_limit(losses, self._module, sample, self._owner)[1]

    def state_dict(self) -> dict[str, Any]:
        """The stages so far, as the files of a report."""
        with tempfile.TemporaryDirectory() as folder:
            bif_store.write(self.found, Path(folder))
            written = {file.name: bytearray(file.read_bytes()) for file in Path(folder).iterdir()}
        files = {name: torch.frombuffer(data, dtype=torch.uint8) for name, data in written.items()}
        return {"reached": list(self._reached), "files": files}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in state["files"].items():
                (Path(folder) / name).write_bytes(data.numpy().tobytes())
            self.found = list(bif_store.load(Path(folder)))
        self._reached = set(state["reached"])

    def missed(self) -> list[str]:
        """A note on the stages that training never reached."""
        missed = [at for at in self.bif.at if at not in self._reached and at != "end"]
        return [f"BIF: training ended before epochs {missed} of at={list(self.bif.at)}"] if missed else []


def _scored(bif: BIF, count: int, most: int, mu: Floats | None) -> tuple[NDArray[np.int64], list[str]]:
    """Dataset indices to score: those asked for, all, or of a large set random ones and as many of f-INE's extremes.

    The random ones are the same at every stage.
    """
    if bif.rows is not None and not isinstance(bif.rows, int):
        return np.asarray(list(bif.rows), dtype=np.int64), []
    most = min(count, most if bif.rows is None else bif.rows)
    if most == count:
        return np.arange(count), []
    drawn = np.random.default_rng(bif.seed).permutation(count)
    if mu is None:
        return np.sort(drawn[:most]), [f"BIF: scored are {most:,} of {count:,} rows, drawn at random"]
    extreme = np.nan_to_num(np.abs(mu) / np.nanstd(mu, axis=0)).max(1)
    extreme[drawn[: most - most // 2]] = -1.0
    first = np.argsort(-extreme, kind="stable")[: most // 2]
    note = (
        f"BIF: scored are {most:,} of {count:,} rows, the {len(first):,} that f-INE finds most extreme and random ones"
    )
    return np.sort(np.concatenate([first, drawn[: most - len(first)]])), [note]


def _data(scored: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Sorted dataset indices for the posterior: all, or of a large set a random sample and the scored rows."""
    if count <= MAX_DATA:
        return np.arange(count)
    return np.union1d(scored, np.random.default_rng(0).choice(count, MAX_DATA, replace=False))


def _fast(module: nn.Module, query: BoundQuery, source: DataSource, to_device: Callable[[Batch], Batch]) -> BoundQuery:
    """The query on the device; a mean loss is read off the step's own loss, so that its metrics do not run."""
    batches = tuple((weight, to_device(batch)) for weight, batch in query.batches)
    query = replace(query, batches=batches)
    if query.value != source.loss:
        return query
    try:
        with isolated(module):
            losses = row_losses(module, batches[0][1], steps=("validation_step", "training_step"))
    except InfluenceError:  # its rows cannot be told apart, its mean can
        return query

    def mean(module: nn.Module, batch: Batch) -> Tensor:
        return losses(module, batch).mean()

    return replace(query, value=mean)


def _track(bar: ProgressBar | None, draws: int) -> Iterator[int]:
    """Counts the draws in the trainer's own progress bar, if it has one."""
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        task = bar.progress.add_task("BIF chains", total=draws)
        for draw in range(draws):
            yield draw
            bar.progress.update(task, advance=1, visible=True)
        return
    steps: Iterable[int] = range(draws)
    if isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]  # comes with Lightning

        steps = tqdm(steps, desc="BIF chains", leave=False)
    yield from steps
