"""The stage after training: chains around the trained weights, with the trainer's data, queries and precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from numpy.typing import NDArray
from torch import Tensor, nn

from ine_callback.bif.rowloss import row_losses
from ine_callback.bif.run import MAX_ROWS, run_bif
from ine_callback.bif.scores import BIFScores
from ine_callback.errors import InfluenceError
from ine_callback.isolation import isolated
from ine_callback.methods.bif import BIF
from ine_callback.queries import Batch, BoundQuery
from ine_callback.scores import Floats
from ine_callback.sources import DataSource

MAX_DATA = 20_000  # rows that the posterior's mean loss is taken over


def run_chains(
    bif: BIF,
    module: nn.Module,
    source: DataSource,
    bound: list[BoundQuery],
    mu: Floats,
    to_device: Callable[[Batch], Batch],
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    bar: ProgressBar | None,
    owner: str,
) -> BIFScores:
    """Runs the chains on the rows of the training set.

    Args:
        bif: Settings; ``rows`` are dataset indices.
        module: The trained model.
        source: The training set.
        bound: The run's queries.
        mu: f-INE's scores [N, Q], which choose the rows of a large training set.
        to_device: What the trainer does to a batch.
        context: The trainer's precision.
        bar: The trainer's progress bar.
        owner: Class named in messages.

    Raises:
        InfluenceError: If rows, row losses or queries cannot be had.
    """
    if not bound:
        raise InfluenceError(f"{owner}: BIF has no query: 'self' is f-INE's alone; add 'val' or another one.")
    count = len(mu)
    scored, notes = _scored(bif, mu)
    data = _data(scored, count)
    train = to_device(source.training(data.tolist()))
    if len(data) < count:
        notes.append(f"BIF: the posterior's mean loss is over {len(data):,} of {count:,} rows")
    queries = {query.info.name: _fast(module, query, source, to_device) for query in bound}
    place = np.searchsorted(data, scored)
    found = run_bif(
        module,
        train,
        queries,
        replace(bif, rows=place.tolist()),
        progress=lambda draws: _track(bar, draws),
        context=context,
        owner=owner,
    )
    return replace(found, rows=data[found.rows], notes=(*notes, *found.notes))


def _scored(bif: BIF, mu: Floats) -> tuple[NDArray[np.int64], list[str]]:
    """Dataset indices to score: those asked for, all, or of a large set f-INE's extremes and as many random ones."""
    count = len(mu)
    if bif.rows is not None and not isinstance(bif.rows, int):
        return np.asarray(list(bif.rows), dtype=np.int64), []
    most = min(count, MAX_ROWS if bif.rows is None else bif.rows)
    if most == count:
        return np.arange(count), []
    extreme = np.nan_to_num(np.abs(mu) / np.nanstd(mu, axis=0)).max(1)
    first = np.argsort(-extreme, kind="stable")[: most // 2]
    others = np.setdiff1d(np.arange(count), first)
    drawn = np.random.default_rng(bif.seed).choice(others, most - len(first), replace=False)
    note = (
        f"BIF: scored are {most:,} of {count:,} rows, the {len(first):,} that f-INE finds most extreme and random ones"
    )
    return np.sort(np.concatenate([first, drawn])), [note]


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
